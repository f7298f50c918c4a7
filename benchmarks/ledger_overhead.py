"""What the ledger costs: the time of a training step with it, over the time without, beside MemTracker.

    python -m benchmarks.ledger_overhead [--repeats 16] [--threads 1 2]

Plain step, step in a dispatch mode that does nothing (what any such tool costs at least), step in the ledger
(breakdown included) and step in torch's MemTracker are run in turn; each ratio is the median over the turns,
so that a machine whose speed drifts does not favour one of them. All of them run in a heap that gives nothing
back to the system: glibc otherwise hands pages out and back by rules of its own, and whoever draws more page
faults (2,000 or 90,000 in one and the same step) looks slower by up to a tenth.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import Step, resnet50_step, transformer_step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger

MODELS: dict[str, Callable[[str], Step]] = {
    "WideResNet-28-2, batch 100": wide_resnet_step,
    "ResNet-50, batch 8, 64x64": resnet50_step,
    "12-layer transformer, width 256, batch 8 x 64 tokens": transformer_step,
}


def keep_the_heap() -> None:
    """Tell glibc's malloc to take big blocks from its heap, too, and never to shrink it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # the names' numbers in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 2**26)


def in_ledger(step: Step) -> None:
    with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
        step()
    ledger.breakdown()


class EmptyMode(TorchDispatchMode):
    """Sees every operator and does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_empty_mode(step: Step) -> None:
    with EmptyMode():
        step()


def in_memtracker(step: Step) -> None:
    tracker = MemTracker()
    tracker.track_external(step.model, step.optimizer, *step.inputs)
    with tracker:
        step()
    tracker.get_tracker_snapshot("peak")


def seconds(run: Callable[[], None]) -> dict[str, float]:
    """Wall time, which users wait for, and CPU time of all threads, which other processes disturb less."""
    gc.collect()  # nobody pays for the garbage of the one before
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(make: Callable[[str], Step], repeats: int) -> dict[str, float]:
    step = make("cpu")
    turns = {
        "plain": step,
        "empty_mode": lambda: in_empty_mode(step),
        "ledger": lambda: in_ledger(step),
        "memtracker": lambda: in_memtracker(step),
    }
    order = random.Random(0)
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
    for turn in range(repeats + 1):
        # Whoever comes after MemTracker finds another heap; so nobody has a fixed place in the turn.
        for name, run in order.sample([*turns.items()], len(turns)):
            measured = seconds(run)
            if turn:  # the first turn warms up
                spent[name].append(measured)
    results = {}
    for clock in ("wall", "cpu"):
        for name in turns:
            median = statistics.median(one[clock] for one in spent[name])
            results[f"{name}_{clock}_s"] = round(median, 3)
        for name in ("empty_mode", "ledger", "memtracker"):
            pairs = zip(spent["plain"], spent[name], strict=True)
            ratio = statistics.median(tracked[clock] / plain[clock] for plain, tracked in pairs)
            results[f"{name}_over_plain_{clock}"] = round(ratio, 3)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    keep_the_heap()
    results = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, make in MODELS.items():
            key = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            results[key] = measure(make, options.repeats)
            print(key, results[key])
    write_results("ledger_overhead", results)


if __name__ == "__main__":
    main()
