"""The same training twice, plain and with a technique, and everything that Lightning shows of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.trainers import quiet_trainer


@dataclass
class Observed(Callback):
    """What callbacks and loggers see of a run."""

    gradients: list[list[Tensor | None]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    on_step: list[dict[str, Tensor]] = field(default_factory=list)
    on_epoch: list[dict[str, Tensor]] = field(default_factory=list)
    global_steps: list[int] = field(default_factory=list)
    loop_state: Any = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in pl_module.parameters()])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs.append(copy.deepcopy(outputs))
        self.on_step.append(_copy(trainer.logged_metrics))
        self.global_steps.append(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_epoch.append(_copy(trainer.callback_metrics))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop_state = copy.deepcopy(trainer.fit_loop.state_dict())


def _copy(metrics: Any) -> dict[str, Tensor]:
    # What a technique says of itself is not there without it.
    return {k: torch.as_tensor(v).clone() for k, v in metrics.items() if not k.startswith("microbatching/")}


@dataclass
class Run:
    """A finished training."""

    observed: Observed
    model: LightningModule
    trainer: Trainer


def train(
    make_model: Any, batches: Any, folder: Path, *callbacks: Callback, seed: int = 0, **options: Any
) -> Run:
    """Train a freshly made model on given batches, one epoch after the other."""
    torch.manual_seed(seed)
    model = make_model()
    observed = Observed()
    trainer = quiet_trainer(
        folder, *callbacks, observed, **{"max_epochs": 2, "log_every_n_steps": 1} | options
    )
    torch.manual_seed(seed + 1)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return Run(observed, model, trainer)


def assert_same(first: Any, second: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Structure, keys, and tensors up to rounding."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        torch.testing.assert_close(first, second, rtol=rtol, atol=atol, equal_nan=True)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key], rtol, atol)
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other, rtol, atol)
    elif isinstance(first, float):
        assert_same(torch.tensor(first), torch.tensor(second), rtol, atol)
    else:
        assert first == second


def assert_same_run(first: Run, second: Run, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Gradients, parameters, buffers, logs, outputs, counters and the loops' state."""
    for name in ("gradients", "outputs", "on_step", "on_epoch", "global_steps", "loop_state"):
        assert_same(getattr(first.observed, name), getattr(second.observed, name), rtol, atol)
    assert_same(dict(first.model.state_dict()), dict(second.model.state_dict()), rtol, atol)
    states = [[opt.state_dict()["state"] for opt in run.trainer.optimizers] for run in (first, second)]
    assert_same(*states, rtol, atol)
