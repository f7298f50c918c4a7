"""A signal to end ends training between two steps, with a checkpoint from which it can go on exactly."""

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

# Ctrl-C; what schedulers, containers and `kill` send; a terminal that is closed.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopOnInterrupt(Checkpoint):
    """Waits for the end of a step, saves a checkpoint and ends training as if the signal had come then.

    A signal that arrives in the middle of a step would leave some parameters updated and others not.
    So the first one is only noted. The checkpoint is made at the end of a step, if the optimizer has used
    all gradients and no validation follows; otherwise a later step's end is waited for. Training ends before
    the next step, when what the last one logged has been written. A second signal ends training at once,
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
        self.signal: signal.Signals | None = None
        """What has come last."""
        self._can_save = False
        self._saving = False
        self._pid = os.getpid()

    @contextmanager
    def listening(self, trainer: pl.Trainer) -> Iterator[None]:
        """Take the signals over for as long as the block runs.

        Args:
            trainer: what trains in the block; without this callback, a signal ends it at once.
        """
        self._can_save = self in trainer.callbacks  # type: ignore[attr-defined]
        # Lightning ignores SIGINT after an interrupt and leaves it so; this puts it back as well.
        before = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that was ended by the signal; 0 if none has come."""
        return 0 if self.signal is None else 128 + self.signal

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A data loader's worker, which inherited this handler. Ctrl-C comes to all, and a worker is told
            # when to stop; anything else is meant for it.
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.signal = signal.Signals(signum)
        if self.signal.name == "SIGHUP":
            _leave_terminal()
        if self.requested or not self._can_save:
            raise KeyboardInterrupt
        self.requested = True
        if os.environ.get("LOCAL_RANK", "0") == "0":
            again = "Ctrl-C again" if signum == signal.SIGINT else f"another {self.signal.name}"
            # Not print(): the signal may have come in the middle of one.
            text = f"\nmemtrain: stopping after this step with a checkpoint; {again} stops at once\n"
            os.write(2, text.encode())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM over again: Lightning has put a handler of its own before this one."""
        if signal.getsignal(signal.SIGINT) == self._on_signal:
            signal.signal(signal.SIGTERM, self._on_signal)

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


def _leave_terminal() -> None:
    """Let nothing fail that is still to be said: a terminal that is closed takes no text any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
