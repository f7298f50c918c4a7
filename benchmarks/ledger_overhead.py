"""What the ledger costs: the time of a training step with it, over the time without, beside MemTracker.

    python -m benchmarks.ledger_overhead [--repeats 7] [--threads 2]

Plain step, step in the ledger (breakdown included) and step in torch's MemTracker are run in turn; each
ratio is the median over the turns, so that a machine whose speed drifts does not favour one of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.models import Step, resnet50_step, transformer_step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger

MODELS: dict[str, Callable[[str], Step]] = {
    "WideResNet-28-2, batch 100": wide_resnet_step,
    "ResNet-50, batch 8, 64x64": resnet50_step,
    "12-layer transformer, width 256, batch 8 x 64 tokens": transformer_step,
}


def in_ledger(step: Step) -> None:
    with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
        step()
    ledger.breakdown()


def in_memtracker(step: Step) -> None:
    tracker = MemTracker()
    tracker.track_external(step.model, step.optimizer, *step.inputs)
    with tracker:
        step()
    tracker.get_tracker_snapshot("peak")


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU time of all threads, which other processes on the machine disturb least."""
    before = time.process_time()
    run()
    return time.process_time() - before


def measure(make: Callable[[str], Step], repeats: int) -> dict[str, float]:
    step = make("cpu")
    turns = {"plain": step, "ledger": lambda: in_ledger(step), "memtracker": lambda: in_memtracker(step)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(repeats + 1):
        for name, run in turns.items():
            spent = cpu_seconds(run)
            if turn:  # the first turn warms up
                seconds[name].append(spent)
    ratios = {
        name: statistics.median(b / a for a, b in zip(seconds["plain"], seconds[name], strict=True))
        for name in ("ledger", "memtracker")
    }
    return {
        "plain_cpu_s": round(statistics.median(seconds["plain"]), 3),
        "ledger_cpu_s": round(statistics.median(seconds["ledger"]), 3),
        "memtracker_cpu_s": round(statistics.median(seconds["memtracker"]), 3),
        "ledger_over_plain": round(ratios["ledger"], 3),
        "memtracker_over_plain": round(ratios["memtracker"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name, make in MODELS.items():
        results[name] = measure(make, options.repeats)
        print(name, results[name])
    write_results("ledger_overhead", results)


if __name__ == "__main__":
    main()
