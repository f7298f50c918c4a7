"""A whole step of Lightning on trial before each real one: the run goes as if there had been none."""

from __future__ import annotations

import io
import logging
import threading
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_memtrain import LowPrecision, SparseTraining
from lightning_memtrain.sparsity import RigL, UpdateEvery
from lightning_memtrain.tracing import UserState

SEEN: list[int] = []


class Lookahead(torch.optim.SGD):
    """Counts in a dictionary, and lets its rate follow the count."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.history = {"steps": 0}

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        self.history["steps"] += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.history["steps"]
        return loss


class Meter:
    total = 0.0
    num = 0

    def add(self, value: Tensor) -> None:
        self.total = self.total + value
        self.num += 1


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 8))
        self.metric = MeanMetric()
        self.meter = Meter()
        self.nested: dict[str, Any] = {"outputs": [[]]}
        self.weights = torch.ones(8)
        self.hidden: Tensor | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.net(batch) * self.weights.clone()
        if self.hidden is not None:
            hidden = hidden + self.hidden.mean()
        loss = hidden.square().mean()
        self.hidden = hidden.detach()
        self.weights.mul_(0.99)
        self.metric.update(loss.detach())
        self.meter.add(loss.detach())
        self.nested["outputs"][0].append(loss.detach())
        SEEN.append(batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = Lookahead(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Counts(pl.Callback):
    """A user's callback with state."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms.append(float(sum(weight.grad.float().norm() for weight in pl_module.parameters())))


class Trial(pl.Callback):
    """Runs each batch twice: once on trial, and once as Lightning does."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        state = UserState(pl_module, *trainer.optimizers, batch, copies=lambda tensor: True)
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        kwargs = {"batch": batch, "batch_idx": batch_idx}
        for _ in range(2):
            loop.run(trainer.optimizers[0], batch_idx, kwargs)
            for config in trainer.lr_scheduler_configs:
                config.scheduler.step()
            state.restore()


def outcome(trial: bool, make: Any = tuple, **settings: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """What a run leaves behind: plain numbers and tensors."""
    torch.manual_seed(0)
    SEEN.clear()
    model, counts = Net(), Counts()
    callbacks = [*make(), counts, *([Trial()] if trial else [])]
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **settings,
    )
    data = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    trainer.fit(model, DataLoader(data, batch_size=4))
    (optimizer,) = trainer.optimizers
    plain = {
        "history": optimizer.history,
        "rates": [group["lr"] for group in optimizer.param_groups],
        "meter": model.meter.num,
        "seen": [*SEEN],
        "norms": counts.norms,
        "outputs": len(model.nested["outputs"][0]),
        "steps": trainer.global_step,
        "progress": trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.state_dict(),
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "updates": model.metric._update_count,
    }
    assert model.hidden is not None
    tensors = [*model.state_dict().values(), model.weights, model.hidden, *model.nested["outputs"][0]]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return plain, tensors


@pytest.mark.parametrize("technique", ["none", "low precision", "sparse"])
def test_a_run_goes_as_if_no_step_had_been_tried(technique: str) -> None:
    def settings() -> dict[str, Any]:
        if technique == "low precision":
            return {"plugins": [LowPrecision("bf16-true")]}
        if technique == "sparse":
            return {"make": lambda: [SparseTraining(RigL(sparsity=0.5), update=UpdateEvery(2))]}
        return {}

    plain, tensors = outcome(False, **settings())
    tried, others = outcome(True, **settings())
    assert tried == plain
    assert plain["outputs"] == 6
    assert len(tensors) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def test_what_is_outside_of_memory_is_left_alone(tmp_path: Any) -> None:
    class Run:
        __module__ = "wandb.sdk.wandb_run"

        def __init__(self) -> None:
            self.history: list[int] = []

    net = nn.Linear(1, 1)
    net.run, net.loader = Run(), DataLoader([1, 2, 3])
    net.log = logging.getLogger("of a test of user state")
    net.thread, net.lock = threading.Thread(), threading.Lock()
    net.file = io.StringIO()
    state = UserState(net)
    net.run.history.append(1)
    net.loader.mark = 1
    net.log.mark = 1
    net.file.write("text")
    with net.lock:
        state.restore()
        assert net.lock.locked()
    assert net.run.history == [1]
    assert net.loader.mark == 1
    assert net.log.mark == 1
    assert net.file.getvalue() == "text"


def test_of_a_data_module_attributes_are_set_back_and_data_is_not_looked_at() -> None:
    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.items, self.num = [1], 0

    net = nn.Linear(1, 1)
    net.data = Data()
    state = UserState(net)
    net.data.items.append(2)
    net.data.num = 1
    state.restore()
    assert (net.data.items, net.data.num) == ([1, 2], 0)
