"""What low precision costs in quality and saves in bytes: validation losses, and bytes per parameter.

    python -m benchmarks.precision [--steps 3000] [--only loss bytes time]

loss: mean squared error of a network that learns from another one's noisy answers, by 3 seeds, with weights
in float32, in bfloat16 rounded to nearest by the optimizer, and in bfloat16 under stochastic rounding; the
last two as a ratio to float32, of the means over seeds.

bytes: weights, gradients and optimizer state by the ledger after a step, per parameter, of a network with
4 million of them; and the most that the step itself holds beside them.

time: one step of that network's optimizer; the contenders take turns, and the median over the turns counts.

8-bit Adam is measured where bitsandbytes is installed, 4-bit where torchao is.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.precision_regression import FORMATS, MakeOptimizer, validation_loss
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import MIB, Category
from lightning_memtrain.precision import SGD8bit, adamw4bit, adamw8bit
from lightning_memtrain.precision.optimizers.bucketed_step import BucketedStep
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise

SEEDS = range(3)
WIDTH, DEPTH = 1024, 4
LOSS_RATIO_BAR = 1.01
# Bytes of weights, gradients and state per parameter, at most.
BYTES_BARS = {"AdamW, 8 bit": 6.1, "SGD, momentum in 8 bit": 5.05, "AdamW, 4 bit": 5.1}

LOSS_OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=3e-4),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=3e-3, momentum=0.9),
    "SGD, momentum in 8 bit": lambda ps: SGD8bit(ps, lr=3e-3),
}
STEP_OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, momentum=0.9),
    "SGD, momentum in 8 bit": lambda ps: SGD8bit(ps),
}
if find_spec("bitsandbytes"):
    LOSS_OPTIMIZERS["AdamW, 8 bit"] = lambda ps: adamw8bit(ps, lr=3e-4)
    STEP_OPTIMIZERS["AdamW, 8 bit"] = lambda ps: adamw8bit(ps)


def loss_rows(num_steps: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, make in LOSS_OPTIMIZERS.items():
        losses = {
            kept: [validation_loss(f, make, seed, num_steps) for seed in SEEDS] for kept, f in FORMATS.items()
        }
        means = {kept: statistics.mean(values) for kept, values in losses.items()}
        row: dict[str, Any] = {k: [float(f"{x:.5f}") for x in values] for k, values in losses.items()}
        ratios = {kept: round(mean / means["fp32"], 4) for kept, mean in means.items() if kept != "fp32"}
        row |= {"ratio_to_fp32": ratios, "bar": LOSS_RATIO_BAR}
        row["within_bar"] = ratios["bf16, stochastic"] <= LOSS_RATIO_BAR
        rows[name] = row
        print("loss", name, row)
    return rows


def large_network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))).to(dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def bytes_rows() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    optimizers = dict(STEP_OPTIMIZERS)
    if find_spec("torchao"):
        optimizers["AdamW, 4 bit"] = lambda ps: adamw4bit(ps)
    for name, make in optimizers.items():
        for kept, dtype in (("fp32", torch.float32), ("bf16, stochastic", torch.bfloat16)):
            model = large_network(dtype)
            optimizer = make(model.parameters())
            step: Any = optimizer.step
            if dtype != torch.float32:
                step = BucketedStep(optimizer, RoundingNoise(0)).step
            step()  # makes the state
            with MemoryLedger(model, optimizer) as ledger:
                step()
            held = ledger.breakdown()
            numel = sum(p.numel() for p in model.parameters())
            at_start = {category: num_bytes / numel for category, num_bytes in held.maxima.items()}
            kept_bytes = 2 * dtype.itemsize + at_start[Category.OPTIMIZER_STATE]
            row = {
                "optimizer_state": round(at_start[Category.OPTIMIZER_STATE], 4),
                "weights_gradients_and_state": round(kept_bytes, 4),
                "step_peak_mib": round(held.ledger_peak_bytes / MIB, 2),
                "held_before_step_mib": round(held.start_bytes / MIB, 2),
            }
            if kept != "fp32" and name in BYTES_BARS:
                bar = BYTES_BARS[name]
                row |= {"bar": bar, "within_bar": row["weights_gradients_and_state"] <= bar}
            rows[f"{name}, {kept}"] = row
            print("bytes", name, kept, row)
    return rows


def time_rows(num_turns: int = 9) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    for name, make in STEP_OPTIMIZERS.items():
        for kept, form in FORMATS.items():
            optimizer = make(large_network(form.dtype).parameters())
            steps[name, kept] = (
                BucketedStep(optimizer, RoundingNoise(0)).step if form.stochastic else optimizer.step
            )
    seconds: dict[Any, list[float]] = {key: [] for key in steps}
    for turn in range(num_turns + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[key].append(time.perf_counter() - start)
    rows: dict[str, Any] = {}
    for (name, kept), values in seconds.items():
        rows.setdefault(name, {})[f"{kept}, ms"] = round(1000 * statistics.median(values), 2)
    print("time", rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of each training")
    parser.add_argument(
        "--only", nargs="+", choices=("loss", "bytes", "time"), default=("loss", "bytes", "time")
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for part in arguments.only:
        rows = {"loss": lambda: loss_rows(arguments.steps), "bytes": bytes_rows, "time": time_rows}[part]()
        write_results(f"precision_{part}", rows)


if __name__ == "__main__":
    main()
