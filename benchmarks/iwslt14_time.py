"""Steps per second of the variants of the translation recipe, beside the baseline.

    python -m benchmarks.iwslt14_time [--batch typical] [--data-dir DIR]
    python -m benchmarks.iwslt14_time --lengths FILE.npz --dictionaries DIR

The batches are those of `benchmarks.iwslt14_memory`, which says what the options mean. Variants take turns in
one process, in an order that moves on from turn to turn; a time is the median over all steps of all turns,
the first of each turn left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_memtrain as mt
from benchmarks.iwslt14_memory import LINEAR, add_workload, find_workload, make_sample, rows, train
from benchmarks.results_file import write_results

VARIANTS = {
    "baseline": "baseline: float32, Adam, as fairseq",
    "recipe": "chunked loss",
    "microbatched": "8 microbatches, chunked loss",
    "checkpointed": "checkpointed, chunked loss",
    "bf16": "bf16",
    "all": "all: and 80 % zeros in linear layers",
}


class StepTimes(pl.Callback):
    """Seconds of each step, the optimizer's part included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin to count."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop counting."""
        self.seconds.append(time.perf_counter() - self._start)


def variants() -> dict[str, tuple[dict[str, Any], list[pl.Callback], dict[str, Any]]]:
    """Arguments of the module, callbacks and arguments of the Trainer, freshly made, by variant."""
    of_row = rows()
    made = {name: of_row[row] for name, row in VARIANTS.items()}
    sparse = mt.SparseTraining(mt.sparsity.DSR(0.8), layers=LINEAR)
    return made | {"sparse": ({}, [sparse], {})}


def summary(seconds: Mapping[str, Sequence[float]], target_tokens: int) -> dict[str, Any]:
    """Median time, and what follows from it, by variant."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "steps_per_second": round(1 / median, 3),
            "target_tokens_per_second": round(target_tokens / median, 1),
            "time_over_baseline": round(median / medians["baseline"], 2),
            "seconds": [round(second, 2) for second in seconds[name]],
        }
        for name, median in medians.items()
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_workload(parser)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of a turn, the first of which is left out"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload, shape = find_workload(parser, options)
    sample = make_sample(workload, shape)
    seconds: dict[str, list[float]] = {name: [] for name in variants()}
    for turn in range(options.turns):
        names = list(seconds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            arguments, callbacks, settings = variants()[name]
            watch = StepTimes()
            train(workload.dictionaries, sample, options.steps, arguments, [*callbacks, watch], settings)
            seconds[name] += watch.seconds[1:]
            print(name, [round(second, 2) for second in watch.seconds], flush=True)
    results = summary(seconds, sample["ntokens"])
    write_results(f"iwslt14_time_{options.batch}", {"threads": 1, "variants": results})


if __name__ == "__main__":
    main()
