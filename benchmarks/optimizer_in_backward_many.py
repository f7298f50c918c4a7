"""What stepping in backward costs when there are many small parameters.

    python -m benchmarks.optimizer_in_backward_many [--turns 15]

tensors: backward, step and zeroing of as many parameter tensors of four numbers, beside plain torch. trainer:
whole steps of a chain of linear layers 16 wide, with biases, in a Trainer, beside plain Lightning.

Plain and in backward take turns step by step in one process, on parameters of their own; a ratio is the
median of the ratios of neighbouring steps. Times are those that the process spent on one thread of the CPU,
so that others on the machine disturb less. The exponent is that of time by number between the two largest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from benchmarks.lightning_steps import fit
from benchmarks.models import Step
from benchmarks.results_file import write_results
from lightning_memtrain import OptimizerInBackward
from lightning_memtrain.optimizer_in_backward.backward_steps import BackwardSteps
from lightning_memtrain.optimizer_steps import step_parameter

NUMBERS = (100, 500, 1000, 5000)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
WIDTH = 16


def plain_step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[float]:
    """Seconds of one step after the other."""
    while True:
        loss = torch.stack([(p * p).sum() for p in parameters]).sum()
        begun = time.process_time()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield time.process_time() - begun


def step_in_backward(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[float]:
    """Seconds of one step after the other."""
    steps = BackwardSteps(optimizer, step_parameter)
    while True:
        loss = torch.stack([(p * p).sum() for p in parameters]).sum()
        begun = time.process_time()
        steps.begin(loss, last=True)
        loss.backward()
        steps.end()
        optimizer.step()
        optimizer.zero_grad()
        yield time.process_time() - begun


def row_of(plain: list[float], in_backward: list[float]) -> dict[str, float]:
    """Medians of steps and of their ratios."""
    pairs = list(zip(plain, in_backward, strict=True))
    return {
        "plain_ms": round(1e3 * statistics.median(one for one, _ in pairs), 3),
        "in_backward_ms": round(1e3 * statistics.median(other for _, other in pairs), 3),
        "time_ratio": round(statistics.median(other / one for one, other in pairs), 3),
    }


def tensor_rows(turns: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, make in OPTIMIZERS.items():
        for number in NUMBERS:
            contenders = []
            for contender in (plain_step, step_in_backward):
                parameters = [nn.Parameter(torch.randn(4)) for _ in range(number)]
                contenders.append(contender(parameters, make(parameters)))
            times: list[list[float]] = [[], []]
            for turn in range(turns + 2):
                for which in (0, 1) if turn % 2 else (1, 0):
                    times[which].append(next(contenders[which]))
            rows.setdefault(name, {})[str(number)] = row_of(times[0][2:], times[1][2:])  # without warming up
            print("tensors", name, number, rows[name][str(number)])
    return rows


class Times(pl.Callback):
    """Seconds that the process has spent at the end of each batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        """Seconds of each batch but the first."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def chain(number: int, make: Callable[[Any], torch.optim.Optimizer]) -> Step:
    """So many parameter tensors, half of them biases."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(number // 2)))
    inputs = (torch.randn(4, WIDTH),)
    return Step(model, make(model.parameters()), inputs, lambda model, x: model(x).square().mean())


def trainer_rows(turns: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, make in OPTIMIZERS.items():
        for number in NUMBERS:
            times: list[list[float]] = [[], []]
            for turn in range(4):
                for which in (0, 1) if turn % 2 else (1, 0):
                    step, clock = chain(number, make), Times()
                    callbacks = [OptimizerInBackward()] if which else []
                    fit(step, [step.inputs] * (turns // 2 + 3), *callbacks, clock)
                    times[which] += clock.steps[2:]
            rows.setdefault(name, {})[str(number)] = row_of(*times)
            print("trainer", name, number, rows[name][str(number)])
    return rows


def with_exponents(rows: dict[str, Any]) -> dict[str, Any]:
    fewer, more = NUMBERS[-2:]
    for by_number in rows.values():
        for which in ("plain", "in_backward"):
            ratio = by_number[str(more)][f"{which}_ms"] / by_number[str(fewer)][f"{which}_ms"]
            by_number[f"exponent_{which}"] = round(math.log(ratio) / math.log(more / fewer), 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = {
        "tensors": with_exponents(tensor_rows(arguments.turns)),
        "trainer": with_exponents(trainer_rows(arguments.turns)),
    }
    write_results("optimizer_in_backward_many", rows)


if __name__ == "__main__":
    main()
