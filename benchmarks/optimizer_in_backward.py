"""What stepping in backward saves and costs, and what accumulating in Adam's moments does to training.

    python -m benchmarks.optimizer_in_backward [--repeats 5] [--only memory loss]

memory: WideResNet-28-2 at batch 8 with SGD and momentum, and a transformer language model with AdamW, in
Lightning: the ledger's peak of a step, the most that gradients and optimizer state took, and the time of a
step. Contenders take turns in one process, in an order that moves on from turn to turn; a time is the median
over all steps of all turns, the first of each turn left out, and a ratio is that to plain Lightning.

loss: AdamA beside AdamW on the sum of the gradients of as many microbatches, on the regression of
`benchmarks.precision_regression`: mean and deviation of the validation loss over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.lightning_steps import fit
from benchmarks.models import Step, transformer_step, wide_resnet_step
from benchmarks.precision_regression import Data, network
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger, Microbatching, OptimizerInBackward
from lightning_memtrain.core import MIB, Category
from lightning_memtrain.optimizer_in_backward import Accumulation, AdamA, ExactMomentum
from lightning_memtrain.optimizer_in_backward.backward_steps import BackwardSteps
from lightning_memtrain.optimizer_steps import step_parameter

NUM_STEPS, BATCH_SIZE, NUM_MICROBATCHES = 6, 8, 4
SEEDS, TRAINING_STEPS, LEARNING_RATES = range(5), 400, (1e-3, 3e-3, 1e-2)


def wide_resnet() -> Step:
    """Without Nesterov's step, which does not go with accumulating in the momentum."""
    step = wide_resnet_step("cpu", BATCH_SIZE)
    step.optimizer = torch.optim.SGD(step.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return step


def transformer() -> Step:
    return transformer_step("cpu", BATCH_SIZE, num_layers=4, width=256)


MODELS: dict[str, tuple[Callable[[], Step], Callable[[], Accumulation]]] = {
    "WRN-28-2, batch 8, SGD with momentum": (wide_resnet, ExactMomentum),
    "transformer, batch 8, AdamW": (transformer, AdamA),
}
Callbacks = Callable[[Callable[[], Accumulation]], list[pl.Callback]]
CONTENDERS: dict[str, Callbacks] = {
    "plain": lambda _: [],
    "in backward": lambda _: [OptimizerInBackward()],
    "4 microbatches": lambda _: [Microbatching(num_microbatches=NUM_MICROBATCHES)],
    "4 microbatches, in backward": lambda accumulation: [
        Microbatching(num_microbatches=NUM_MICROBATCHES),
        OptimizerInBackward(accumulation()),
    ],
}


class Peak(pl.Callback):
    """The ledger of the last batch, when the optimizer has its state."""

    def __init__(self) -> None:
        self.row: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the ledger."""
        if batch_idx == 2:
            self.ledger = MemoryLedger(pl_module, trainer.optimizers, batch)
            self.ledger.__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the ledger."""
        if batch_idx == 2:
            self.ledger.__exit__(None, None, None)
            found = self.ledger.breakdown()
            self.row = {
                "ledger_peak_mib": round(found.ledger_peak_bytes / MIB, 3),
                "gradients_mib": round(found.maxima[Category.GRADIENTS] / MIB, 3),
                "optimizer_state_mib": round(found.maxima[Category.OPTIMIZER_STATE] / MIB, 3),
                "parameters_mib": round(found.maxima[Category.PARAMETERS] / MIB, 3),
            }


class Times(pl.Callback):
    """Seconds between the ends of batches."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def memory_rows(repeats: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for model, (make, accumulation) in MODELS.items():
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        found = {}
        for name, callbacks in CONTENDERS.items():
            step, peak = make(), Peak()
            fit(step, [step.inputs] * 3, *callbacks(accumulation), peak)
            found[name] = peak.row
        names = list(CONTENDERS)
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                step, times = make(), Times()
                fit(step, [step.inputs] * NUM_STEPS, *CONTENDERS[name](accumulation), times)
                seconds[name] += [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]
        plain = statistics.median(seconds["plain"])
        for name, row in found.items():
            median = statistics.median(seconds[name])
            found[name] = row | {"seconds": round(median, 4), "time_ratio": round(median / plain, 3)}
            print(model, "|", name, found[name])
        rows[model] = found
    return rows


def validation_loss(lr: float, seed: int, accumulation: Accumulation | None) -> float:
    """Train with 4 microbatches of 16 per step, and validate on 4096 other inputs."""
    data, model = Data(seed), network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = BackwardSteps(optimizer, step_parameter, accumulation)
    x_val, y_val = data.batch(4096)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        x, y = data.batch()
        chunks = zip(x.chunk(NUM_MICROBATCHES), y.chunk(NUM_MICROBATCHES), strict=True)
        for number, (x_part, y_part) in enumerate(chunks, 1):
            loss = (model(x_part) - y_part).square().mean() / NUM_MICROBATCHES
            if accumulation is not None:
                steps.begin(loss, last=number == NUM_MICROBATCHES)
            loss.backward()
            steps.end()
        optimizer.step()
    with torch.no_grad():
        return (model(x_val) - y_val).square().mean().item()


def loss_rows() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for lr in LEARNING_RATES:
        for name, accumulation in {"AdamW": None, "AdamA": AdamA()}.items():
            losses = [validation_loss(lr, seed, accumulation) for seed in SEEDS]
            row = {
                "mean": round(statistics.mean(losses), 5),
                "deviation": round(statistics.stdev(losses), 5),
            }
            rows.setdefault(f"lr={lr:g}", {})[name] = row
            print("loss", f"lr={lr:g}", name, row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("memory", "loss"), default=["memory", "loss"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "memory" in arguments.only:
        write_results("optimizer_in_backward_memory", memory_rows(arguments.repeats))
    if "loss" in arguments.only:
        write_results("optimizer_in_backward_loss", loss_rows())


if __name__ == "__main__":
    main()
