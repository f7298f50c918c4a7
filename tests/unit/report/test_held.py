"""What the process holds beside a step has a row of its own, to the byte, whether the step uses it or not."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.core import Category
from lightning_memtrain.planning import Device, predict

WEIGHT = 32 * 32 * 4
HELD = 2**16
BATCH = torch.ones(8, 32)


@dataclasses.dataclass
class Kept:
    """A user's object."""

    tensor: Tensor


def kept() -> Tensor:
    return torch.zeros(HELD // 4)


class Average(pl.Callback):
    """A copy of the model that is only moved every fifth step."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model = copy.deepcopy(pl_module.layer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        assert self.model is not None
        if trainer.global_step % 5 == 0:
            torch._foreach_lerp_([*self.model.parameters()], [*pl_module.layer.parameters()], 0.1)


class Net(pl.LightningModule):
    """A layer of 32, and whatever a test gives it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32, bias=False)
        vars(self).update(attributes)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def report_of(model: Net, *callbacks: pl.Callback) -> mt.core.MemoryBreakdown:
    profiler = mt.MemoryProfiler(every_n_steps=1)
    trainer = pl.Trainer(
        max_steps=3,
        callbacks=[*callbacks, profiler],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(BATCH.repeat(3, 1), batch_size=8))
    assert profiler.report is not None
    return profiler.report.stages["fit"]


def closure_over(tensor: Tensor) -> Any:
    return lambda: tensor


@pytest.mark.parametrize(
    "attributes",
    [
        lambda: {"tensor": kept()},
        lambda: {"nested": {"list": [(kept(),)]}},
        lambda: {"object": Kept(kept())},
        lambda: {"function": functools.partial(print, kept())},
        lambda: {"function": closure_over(kept())},
        lambda: {"method": Kept(kept()).__eq__},
        lambda: {"twice": [tensor := kept(), tensor[:5], tensor.view(2, -1)]},
        lambda: {"gradient_of": [nn.Parameter(kept())]},
    ],
    ids=["attribute", "nested", "object", "partial", "closure", "method", "views", "hidden parameter"],
)
def test_what_is_held_and_not_used_is_counted_once(attributes: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    plain, held = report_of(Net()), report_of(Net(**attributes()))
    assert plain.at_peak[Category.HELD] < 512  # numbers that are logged
    assert held.at_peak[Category.HELD] - plain.at_peak[Category.HELD] == HELD
    assert held.at_peak[Category.INPUTS] == plain.at_peak[Category.INPUTS] == 8 * 32 * 4
    assert held.allocator_peak_bytes is not None
    assert plain.allocator_peak_bytes is not None
    assert held.allocator_peak_bytes - plain.allocator_peak_bytes == HELD
    assert held.at_peak[Category.WORKSPACE] == plain.at_peak[Category.WORKSPACE]


def test_an_average_is_held_in_every_step(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    plain, averaged = report_of(Net()), report_of(Net(), Average())
    assert averaged.at_peak[Category.HELD] - plain.at_peak[Category.HELD] == WEIGHT
    assert averaged.at_peak[Category.INPUTS] == plain.at_peak[Category.INPUTS]


def test_what_the_step_uses_is_held_all_the_same(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    class Teacher(Net):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            with torch.no_grad():
                target = self.teacher[0](batch)
            return (self.layer(batch) - target).square().mean()

    teacher = nn.Linear(32, 32, bias=False)
    taught = report_of(Teacher(teacher=[teacher]))
    plain = report_of(Net())
    assert taught.at_peak[Category.HELD] - plain.at_peak[Category.HELD] == WEIGHT
    assert taught.maxima[Category.INPUTS] == plain.maxima[Category.INPUTS]
    assert taught.end_bytes - plain.end_bytes == WEIGHT


def test_parameters_state_and_batch_are_not_held_beside(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = Net()
    vars(model)["again"] = [model.layer.weight, model.layer]
    assert report_of(model).at_peak[Category.HELD] == report_of(Net()).at_peak[Category.HELD]


@pytest.mark.parametrize("device", ["cpu", Device("bare", 2**30, compute_capability=(8, 0))], ids=str)
def test_a_prediction_counts_it_too(device: Any) -> None:
    plain = predict(Net(), BATCH, device=device)
    trainer = pl.Trainer(callbacks=[Average()], accelerator="cpu", logger=False, enable_checkpointing=False)
    averaged = predict(Net(), BATCH, trainer=trainer, device=device)
    more = averaged.breakdown.at_peak[Category.HELD] - plain.breakdown.at_peak[Category.HELD]
    assert more == WEIGHT
    assert averaged.allocated_bytes - plain.allocated_bytes == WEIGHT
