"""Plans by the real search, on CPU: what is predicted holds in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_memtrain as mt
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(one) for one in LIGHTNING_WARNINGS]

LIMIT = 768 * 1024


class Net(pl.LightningModule):
    """Three layers, and what a classifier logs."""

    def __init__(self, accuracy: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5)
        )
        self.accuracy = accuracy
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(len(batch))
        logits = self.layers(batch)
        labels = (batch[:, 0] > 0).long()
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("loss", loss, prog_bar=True)  # Lightning asks for its number
        if self.accuracy is not None:
            self.accuracy(logits.detach(), labels)
            self.log("accuracy", self.accuracy, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Copy(pl.Callback):
    """Holds as much as the limit from the beginning, more than any way could leave of it."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.kept = torch.zeros(LIMIT // 4)


def test_what_a_callback_holds_beside_a_plan_is_known_to_it_or_refused(tmp_path: Path) -> None:
    batch = torch.randn(512, 64)
    data = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer = quiet_trainer(tmp_path, Copy())
    alone = mt.plan(Net(), batch, limit=LIMIT, device="cpu")
    beside = mt.plan(Net(), batch, limit=2 * LIMIT, device="cpu", trainer=trainer)
    assert beside.found.held_bytes - alone.found.held_bytes == LIMIT
    assert mt.planning.Plan.from_dict(beside.to_dict()) == beside
    for plan, expected in ((beside, 2), (alone, 0)):
        model = Net()
        kwargs = plan.trainer_kwargs()
        followed = quiet_trainer(tmp_path, Copy(), *kwargs.pop("callbacks"), **kwargs)
        if expected:
            followed.fit(model, data)
        else:
            with pytest.raises(MisconfigurationException, match=r"finds 763\.97 KiB more on the device"):
                followed.fit(model, data)
        assert sum(model.seen) == expected * 512
    again = mt.FitMemory(limit=2 * LIMIT, plan=alone)
    quiet_trainer(tmp_path, Copy(), again).fit(Net(), data)
    assert again.plan is not None
    assert again.plan.found.held_bytes == beside.found.held_bytes


def test_the_run_keeps_the_limit_that_was_planned(tmp_path: Path) -> None:
    model, callback = Net(), mt.FitMemory(LIMIT)
    profiler = mt.MemoryProfiler(report_dir=tmp_path)
    data = DataLoader(torch.randn(1024, 64), batch_size=512)
    quiet_trainer(tmp_path, profiler, callback).fit(model, data)
    assert callback.plan is not None
    assert callback.plan.chosen is not None
    assert profiler.report is not None
    peak = profiler.report.stages["fit"].peak_bytes
    assert peak <= LIMIT < (callback.plan.plain.reserved_bytes or 0)
    assert peak == pytest.approx(callback.plan.chosen.reserved_bytes, rel=0.05)
    assert callback.exact
    assert sum(model.seen) == 1024  # nothing of what was tried came back


def test_what_needs_nothing_is_found_at_once() -> None:
    asking = MulticlassAccuracy(5)  # it looks at the labels, which have no data
    plan = mt.plan(Net(asking), torch.randn(8, 64), limit="1GiB", device="cpu")
    assert plan.chosen == plan.plain
    assert plan.chosen.lines() == ()
