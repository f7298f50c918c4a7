"""Batch normalisation under microbatching: error of the gradients, peak bytes and time, by mode.

    python -m benchmarks.batchnorm_modes [--repeats 3] [--threads 2]

WideResNet-28-2 (25 batch normalisations) on 64 random images in 4 chunks, at initialisation. Errors are
distances from the gradient of the unsplit batch relative to it, all parameters as one vector, in double
precision: in single precision rounding decides which ReLUs are open, of the unsplit batch as well. Peaks are
the ledger's at the third step. Times of a step are ratios to the unsplit batch, medians over turns in
changing order; 8 sweeps take so many steps. Peaks and times are in single precision.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.ledger_overhead import keep_the_heap
from benchmarks.lightning_steps import Training, Watch, fit, peak_of, trainer_with
from benchmarks.models import Step, checkpoint_blocks, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain.microbatching import Microbatching

BATCH_SIZE, NUM_CHUNKS = 64, 4
SLOW = ("synchronized, 8 sweeps",)


def modes() -> dict[str, Microbatching | None]:
    synchronized = {
        f"synchronized, {sweeps} sweeps": Microbatching(
            NUM_CHUNKS, batchnorm="synchronized", num_batchnorm_sweeps=sweeps
        )
        for sweeps in (1, 2, 4, 8)
    }
    return {
        "unsplit": None,
        "unsplit, every block recomputed": None,
        "pooled": Microbatching(NUM_CHUNKS),
        "chunk": Microbatching(NUM_CHUNKS, batchnorm="chunk"),
        **synchronized,
    }


def make_step(name: str, dtype: torch.dtype) -> Step:
    torch.manual_seed(0)
    step = wide_resnet_step("cpu", BATCH_SIZE)
    step.model.to(dtype)
    step.inputs = (step.inputs[0].to(dtype), step.inputs[1])
    if "recomputed" in name:
        checkpoint_blocks(step.model)
    return step


def run(step: Step, callback: Microbatching | None, num_steps: int, peak: bool) -> Watch:
    watch = Watch(step, peak)
    fit(step, [step.inputs] * num_steps, *([] if callback is None else [callback]), watch)
    return watch


def seconds_per_step(step: Step, callback: Microbatching | None) -> float:
    trainer = trainer_with(*([] if callback is None else [callback]))
    loader = Timed(step.inputs)
    trainer.fit(Training(step), loader)
    return loader.asked[2] - loader.asked[1]  # a step lies between two batches; the first one warms up


class Timed:
    """A loader of three equal batches that notes when it is asked for each."""

    def __init__(self, batch: tuple[torch.Tensor, ...]) -> None:
        self._batch = batch
        self.asked: list[float] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for _ in range(3):
            self.asked.append(time.perf_counter())
            yield self._batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_the_heap()
    expected = run(make_step("unsplit", torch.float64), None, 1, peak=False).gradient
    assert expected is not None
    rows: dict[str, dict[str, Any]] = {}
    for name, callback in modes().items():
        gradient = run(make_step(name, torch.float64), callback, 1, peak=False).gradient
        assert gradient is not None
        error = float((gradient - expected).norm() / expected.norm())
        peak = peak_of(run(make_step(name, torch.float32), callback, 3, peak=True).measured)["ledger_mib"]
        rows[name] = {"gradient_error": float(f"{error:.2e}"), "ledger_mib": peak}
        print(name, rows[name], flush=True)
    timed = {name: callback for name, callback in modes().items() if name not in SLOW}
    spent: dict[str, list[float]] = {name: [] for name in timed}
    order = random.Random(0)
    for _ in range(options.repeats):
        for name, callback in order.sample([*timed.items()], len(timed)):
            spent[name].append(seconds_per_step(make_step(name, torch.float32), callback))
    for name in timed:
        ratios = [one / other for one, other in zip(spent[name], spent["unsplit"], strict=True)]
        rows[name]["time_over_unsplit"] = round(statistics.median(ratios), 2)
        print(name, rows[name])
    write_results("batchnorm_modes", rows)


if __name__ == "__main__":
    main()
