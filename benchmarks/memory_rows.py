"""The memory of one WideResNet-28-2 training step: counted, predicted, and as the allocator says.

    python -m benchmarks.memory_rows [--repeats 16] [--threads 2]

The time of a step is given as a ratio to the first row's; the rows are run in turn, in an order that changes
from turn to turn, and each ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import Step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import MIB
from lightning_memtrain.ledger import OpWorkspace, allocator_statistics

WIDE_RESNET_ROWS: dict[str, Callable[[str], Step]] = {
    "WideResNet-28-2, batch 100": wide_resnet_step,
    "WideResNet-28-2, batch 128": lambda device: wide_resnet_step(device, 128),
    "WideResNet-28-2, batch 100, checkpointed blocks": lambda device: wide_resnet_step(
        device, checkpointed=True
    ),
    "WideResNet-28-2, batch 100 in microbatches of 10": lambda d: wide_resnet_step(d, microbatch_size=10),
}


def measure_row(make: Callable[[str], Step], device: torch.device) -> dict[str, Any]:
    """Predict one step's peak and lay it beside the allocator's."""
    allocator = allocator_statistics(device)
    assert allocator is not None
    step = make(str(device))
    step()  # makes the optimizer's state and the libraries' persistent workspaces
    step()
    gc.collect()
    workspace = OpWorkspace(device)
    with MemoryLedger(step.model, step.optimizer, step.inputs, workspace=workspace) as ledger:
        allocator.start()
        step()
        reading = allocator.stop(ledger.breakdown(timeline=False).start_bytes)
    assert reading is not None
    ledger_bytes, measured_ops_bytes = ledger.breakdown().ledger_peak_bytes, ledger.predicted_peak_bytes
    persistent_bytes = left_after_deleting(step, device)
    predicted_bytes = measured_ops_bytes + persistent_bytes
    return {
        "ledger_mib": round(ledger_bytes / MIB, 2),
        "predicted_mib": round(predicted_bytes / MIB, 2),
        "truth_mib": round(reading.peak_bytes / MIB, 2),
        "libraries_persistent_mib": round(persistent_bytes / MIB, 2),
        "unmeasured_ops": len(workspace.unmeasured),
        "error": round(predicted_bytes / reading.peak_bytes - 1, 5),
    }


def left_after_deleting(step: Step, device: torch.device) -> int:
    """Bytes that stay allocated without model, optimizer and batch: workspaces that libraries keep."""
    if device.type != "cuda":
        return 0
    step.optimizer.state.clear()
    step.optimizer.param_groups.clear()
    step.model.to("meta")
    step.inputs = ()
    gc.collect()
    return torch.cuda.memory_allocated(device)


def time_ratios(repeats: int) -> dict[str, float]:
    """CPU time of each row's step over that of the first row, both per image."""
    steps = {name: make("cpu") for name, make in WIDE_RESNET_ROWS.items()}
    first = next(iter(steps))
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for turn in range(repeats + 1):
        spent = {}
        for name, step in order.sample([*steps.items()], len(steps)):
            before = time.process_time()
            step()
            spent[name] = (time.process_time() - before) / len(step.inputs[0])
        if turn:  # the first turn warms up
            for name in steps:
                ratios[name].append(spent[name] / spent[first])
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}


def main() -> None:
    """Measure all rows on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: measure_row(make, torch.device("cpu")) for name, make in WIDE_RESNET_ROWS.items()}
    for name, ratio in time_ratios(options.repeats).items():
        results[name]["time_per_image_over_first_row"] = ratio
        print(name, results[name])
    write_results("memory_rows", results)


if __name__ == "__main__":
    main()
