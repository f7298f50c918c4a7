"""Benchmark steps in Lightning's training loop, and what to measure there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.models import Step
from lightning_memtrain.core import MIB
from lightning_memtrain.ledger import allocator_statistics
from lightning_memtrain.report.batch_measurement import BatchMeasurement, MeasuredBatch

Batch = tuple[Tensor, ...]


class Training(pl.LightningModule):
    """A benchmark step as a module; logs nothing."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.model = step.model
        self._step = step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._step.loss(self.model, *batch)

    def configure_optimizers(self) -> Optimizer:
        """The step's own optimizer."""
        return self._step.optimizer


def trainer_with(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """A Trainer that runs one epoch and does nothing that a hand-written loop would not do."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return pl.Trainer(
        callbacks=[*callbacks],
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(step: Step, batches: Sequence[Batch], *callbacks: pl.Callback, **settings: Any) -> None:
    """Run a step on batches that are in memory already, in Lightning."""
    loader: DataLoader[Batch] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer_with(*callbacks, **settings).fit(Training(step), loader)


class Watch(pl.Callback):
    """Measures a run: the first step's gradient, and, if asked for, the last step's peak.

    Lightning calls it as a callback; who runs steps by other means calls the methods without ``on_``.

    Args:
        step: what is run.
        peak: whether to put each batch into a ledger.
    """

    def __init__(self, step: Step, peak: bool) -> None:
        self._step, self._peak = step, peak
        self._number = -1
        self._open: BatchMeasurement | None = None
        self.measured = MeasuredBatch()
        self.gradient: Tensor | None = None

    def batch_starts(self, number: int, batch: Any) -> None:
        """Begin to measure a batch of the step with this number; a step may have several."""
        if number != self._number:
            self._number, self.measured = number, MeasuredBatch()
        if self._peak:
            device, optimizers = torch.device("cpu"), [self._step.optimizer]
            allocator = allocator_statistics(device)
            self._open = BatchMeasurement.with_ledger(allocator, self._step.model, optimizers, batch, device)
            self._open.start()

    def optimizer_steps(self) -> None:
        """Keep the gradient, unless a copy of it would show in the peak."""
        if self.gradient is None and not self._peak:
            self.gradient = gradient_of(self._step.model)

    def batch_ends(self) -> None:
        """End the measurement of a batch."""
        if self._open is not None:
            self.measured += self._open.finish(per_module=False, timeline=False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """See :meth:`batch_starts`."""
        self.batch_starts(trainer.global_step, batch)

    def on_before_optimizer_step(self, *_: Any) -> None:
        """See :meth:`optimizer_steps`."""
        self.optimizer_steps()

    def on_train_batch_end(self, *_: Any) -> None:
        """See :meth:`batch_ends`."""
        self.batch_ends()


def gradient_of(model: nn.Module) -> Tensor:
    """The gradients of all parameters as one vector, in double precision."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def peak_of(measured: MeasuredBatch) -> dict[str, Any]:
    """The peaks of the ledger and of the allocator, in MiB, and what was held at the ledger's."""
    breakdown, allocator_peak_bytes = measured.breakdown, measured.allocator_peak_bytes
    assert breakdown is not None
    held = {str(category): round(count / MIB, 2) for category, count in breakdown.at_peak.items() if count}
    return {
        "ledger_mib": round(breakdown.ledger_peak_bytes / MIB, 2),
        "truth_mib": None if allocator_peak_bytes is None else round(allocator_peak_bytes / MIB, 2),
        "at_peak_mib": held,
    }
