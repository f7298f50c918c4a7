"""The profiler on models, batches and threads that users have."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler
from lightning_memtrain.checkpointing import MemoryBudget
from lightning_memtrain.core import Category
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

FLOAT = 4


class Nest(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Nest(depth - 1) if depth else nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@dataclasses.dataclass
class Molecules:
    parts: dataclasses.InitVar[list[torch.Tensor]]
    atoms: torch.Tensor = dataclasses.field(init=False)
    bonds: torch.Tensor = dataclasses.field(init=False)  # never set

    def __post_init__(self, parts: list[torch.Tensor]) -> None:
        self.atoms = torch.stack(parts)

    def to(self, device: Any) -> Molecules:  # Lightning itself reads every field of a dataclass without one
        return self


class Graph:
    def __init__(self, parts: list[torch.Tensor]) -> None:
        self.store = {"atoms": torch.stack(parts)}
        self.itself = self

    @property
    def atoms(self) -> torch.Tensor:
        return self.store["atoms"]

    def to(self, device: Any) -> Graph:
        return self


class Lit(LightningModule):
    def __init__(self, net: nn.Module, batch_type: Any = torch.stack) -> None:
        super().__init__()
        self.net, self.batch_type = net, batch_type

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        atoms = batch if isinstance(batch, torch.Tensor) else batch.atoms
        return self.net(atoms).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(64, 8), batch_size=16, collate_fn=self.batch_type)


def test_two_hundred_nested_modules(tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()
    profiler = MemoryProfiler()
    quiet_trainer(tmp_path, profiler, max_steps=3).fit(Lit(Nest(200)))
    assert sys.getrecursionlimit() == limit
    (leaf,) = [row for row in profiler.breakdowns["fit"].modules if row.parameters_bytes]
    assert leaf.name == ".".join(["net", *["inner"] * 201])
    assert leaf.parameters_bytes == (8 * 2 + 2) * FLOAT


@pytest.mark.parametrize("batch_type", [Molecules, Graph])
def test_a_batch_of_any_kind(tmp_path: Path, batch_type: Any) -> None:
    profiler = MemoryProfiler()
    quiet_trainer(tmp_path, profiler, max_steps=3).fit(Lit(nn.Linear(8, 2), batch_type))
    breakdown = profiler.breakdowns["fit"]
    assert breakdown.maxima[Category.INPUTS] == 16 * 8 * FLOAT
    assert breakdown.start_bytes == 18 * FLOAT + 16 * 8 * FLOAT
    assert profiler.report is not None
    assert not profiler.report.growth["fit"]


def test_a_choice_by_a_step_without_data_adds_nothing_to_the_step_that_makes_it(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    choice = ActivationCheckpointing(MemoryBudget("1GiB"))
    seen = []

    class Each(MemoryProfiler):
        def _publish(self, trainer: Any, stage: Any, all_ranks: bool) -> None:
            seen.append(stage.since_published.breakdown)
            super()._publish(trainer, stage, all_ranks)

    profiler = Each(every_n_steps=1)
    gc.collect()
    gc.disable()  # what the choice leaves in reference cycles stays
    try:
        quiet_trainer(tmp_path, profiler, choice, max_steps=4).fit(Lit(Wide()))
    finally:
        gc.enable()
    inputs = [breakdown.maxima[Category.INPUTS] for breakdown in seen]
    parameters = [breakdown.maxima[Category.PARAMETERS] for breakdown in seen]
    assert inputs == [16 * 8 * FLOAT] * 4
    assert parameters == [6 * 72 * FLOAT] * 4


def test_a_thread_that_runs_operators_meanwhile(tmp_path: Path) -> None:
    over, error = threading.Event(), []

    def work() -> None:
        try:
            other = nn.Linear(8, 8)
            while not over.is_set():
                other(torch.ones(1000, 8)).sum().backward()
        except BaseException as raised:
            error.append(raised)

    profiler = MemoryProfiler(every_n_steps=1)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        quiet_trainer(tmp_path, profiler, max_epochs=5).fit(Lit(nn.Linear(8, 2)))
    finally:
        over.set()
        thread.join()
    assert not error
    breakdown = profiler.breakdowns["fit"]
    assert breakdown.ledger_peak_bytes < 8000 * FLOAT  # what the other holds
    assert breakdown.maxima[Category.GRADIENTS] == 18 * FLOAT
