"""What it costs to move weights: the time of a step with an update of RigL over that of a step without.

    python -m benchmarks.sparse_update [--repeats 9]

Four linear layers at 90 % sparsity under AdamW, in four sizes. A step with an update looks for the largest
gradients of entries that are not stored, and moves 30 % of the weights with their state behind it. Each turn
has steps without and a step with; ratios are medians over turns. The exponent is that of the best line
through the logarithms of stored entries and of the seconds of a step with an update. Processor time, on one
thread.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.ledger_overhead import keep_the_heap
from benchmarks.results_file import write_results
from lightning_memtrain import sparsify_
from lightning_memtrain.sparsity import RigL
from lightning_memtrain.sparsity.methods.rules.layer_updates import UpdateTime
from lightning_memtrain.sparsity.pattern_updater import PatternUpdater

NUM_LAYERS, SPARSITY = 4, 0.9
STORED = (100_000, 300_000, 1_000_000, 1_700_000)
BATCH_SIZES = (8, 64)
MOST_STEPS, MOST_STEPS_AT = 5.0, 1_000_000
MOST_EXPONENT = 1.1


class Run:
    """A model in training.

    Args:
        num_stored: entries of all layers together, about.
        batch_size: rows of a batch.
    """

    def __init__(self, num_stored: int, batch_size: int) -> None:
        torch.manual_seed(0)
        width = round(math.sqrt(num_stored / NUM_LAYERS / (1 - SPARSITY)))
        layers = [nn.Linear(width, width) for _ in range(NUM_LAYERS)]
        for layer in layers:  # so that what is left of the weights passes on as much
            nn.init.normal_(layer.weight, std=math.sqrt(2 / width / (1 - SPARSITY)))
        self.model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        count = round((1 - SPARSITY) * width**2)
        positions = {f"{2 * i}.weight": torch.randperm(width**2)[:count].sort().values for i in range(4)}
        self.updater = PatternUpdater(sparsify_(self.model, positions), RigL(SPARSITY))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(batch_size, width)
        self.target = torch.randn(batch_size, width)
        self.num_stored = NUM_LAYERS * count

    def step(self) -> None:
        """One without an update."""
        self.optimizer.zero_grad()
        (self.model(self.batch) - self.target).square().mean().backward()
        self.updater.record_gradients()
        self.optimizer.step()

    def step_with_update(self, number: int) -> None:
        """One with an update of RigL behind it."""
        moment = UpdateTime(step=number, elapsed=0, total=100)
        self.updater.watch(moment)
        self.step()
        moved = self.updater.update(moment, [self.optimizer])
        assert moved.num_grown == moved.num_dropped > 0


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(num_stored: int, batch_size: int, repeats: int) -> dict[str, Any]:
    run = Run(num_stored, batch_size)
    gc.collect()
    without, with_update = [], []
    for turn in range(repeats + 1):
        around = [seconds(run.step)]
        updating = seconds(lambda number=turn + 1: run.step_with_update(number))  # type: ignore[misc]
        around.append(seconds(run.step))
        if turn:  # the first turn warms up
            without.append(statistics.mean(around))
            with_update.append(updating)
    ratios = [own / plain for own, plain in zip(with_update, without, strict=True)]
    return {
        "stored": run.num_stored,
        "steady_ms": round(1e3 * statistics.median(without), 2),
        "with_update_ms": round(1e3 * statistics.median(with_update), 2),
        "with_update_over_steady": round(statistics.median(ratios), 2),
    }


def exponent(rows: list[dict[str, Any]]) -> float:
    """Of the power of the stored entries that the time of a step with an update grows by."""
    x = [math.log(row["stored"]) for row in rows]
    y = [math.log(row["with_update_ms"]) for row in rows]
    return round(statistics.linear_regression(x, y).slope, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_the_heap()
    results: dict[str, Any] = {}
    for batch_size in BATCH_SIZES:
        rows = []
        for num_stored in STORED:
            rows.append(measure(num_stored, batch_size, options.repeats))
            print(f"batch {batch_size}: {rows[-1]}", flush=True)
        at_bar = rows[STORED.index(MOST_STEPS_AT)]["with_update_over_steady"]
        results[f"batch {batch_size}"] = {
            "rows": rows,
            "exponent": exponent(rows),
            "bars": {"exponent": MOST_EXPONENT, "with_update_over_steady at 1e6": MOST_STEPS},
            "within_bars": exponent(rows) <= MOST_EXPONENT and at_bar <= MOST_STEPS,
        }
        print(f"batch {batch_size}: exponent {exponent(rows)}")
    write_results("sparse_update", results)


if __name__ == "__main__":
    main()
