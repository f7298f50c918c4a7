"""Ctrl-C ends training between two steps, with a checkpoint from which it can go on exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class StopOnInterrupt(Checkpoint):
    """Waits for the end of a step, saves a checkpoint and ends training as if Ctrl-C had come then.

    An interrupt that arrives in the middle of a step would leave some parameters updated and others not.
    So the first Ctrl-C is only noted. The checkpoint is made at the end of a step, if the optimizer has used
    all gradients and no validation follows; otherwise a later step's end is waited for. Training ends before
    the next step, when what the last one logged has been written. A second Ctrl-C ends training at once,
    without a checkpoint.

    It is a ``Checkpoint`` because Lightning calls those last, when all other callbacks have done their part
    of the step and their state can be saved.

    Args:
        path: where the checkpoint goes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.requested = False
        self.saved = False
        self._saving = False
        self._pid = os.getpid()

    @contextmanager
    def listening(self, trainer: pl.Trainer) -> Iterator[None]:
        """Take Ctrl-C over for as long as the block runs.

        Args:
            trainer: what trains in the block; without this callback, Ctrl-C ends it at once.
        """
        if self not in trainer.callbacks:  # type: ignore[attr-defined]
            yield
            return
        # Lightning ignores SIGINT after an interrupt and leaves it so; this puts it back as well.
        before = signal.signal(signal.SIGINT, self._on_sigint)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data loader's worker, which inherited this handler; it is told when to stop
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # Not print(): the signal may have come in the middle of one.
            os.write(
                2, b"\nmemtrain: stopping after this step with a checkpoint; Ctrl-C again stops at once\n"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it was asked for and this is a good moment."""
        # All processes have to save together, and the signal may have reached them in different steps.
        if not trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            return
        self.requested = True
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            self._saving = True
            trainer.save_checkpoint(self.path)
            self._saving = False
            self.saved = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the batch whose end this is as done.

        Lightning does so after this hook, and not all its versions make up for it when they resume: 2.4
        trains on one batch more.
        """
        if not self._saving:
            return
        fit_loop = checkpoint["loops"]["fit_loop"]
        for progress in (fit_loop["epoch_loop.batch_progress"][scope] for scope in ("total", "current")):
            progress["completed"] = progress["processed"]
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The checkpoint would lack what callbacks learn from this validation; wait for another step."""
        self.saved = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End training if the checkpoint is there."""
        if self.saved:
            raise KeyboardInterrupt  # Lightning ends training in good order
