"""Keeps ``run.json`` in a run's folder: how far it is, what it takes, and what it has reached."""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_memtrain.compat.lightning_private import should_accumulate
from lightning_memtrain.coordination import is_watched
from lightning_memtrain.core import MemoryBreakdown
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.report import MemoryProfiler, environment
from lightning_memtrain.report.outputs.wandb_panels import describe
from lightning_memtrain.report.trainer_state import technique_records
from lightning_memtrain.study.machine import load_average, num_cpus
from lightning_memtrain.study.run_record import NAME, RunRecord

#: Where a study tells the processes of its runs which study that is, as JSON.
STUDY_VARIABLE = "MEMTRAIN_STUDY"

# Not at each step: a file system over a network would be asked for each.
_SECONDS_BETWEEN_WRITES = 2.0
# An accelerator works behind the program, and to wait for it takes time: only some steps are timed there.
_TIMED_ON_ACCELERATOR = 10


class RecordRun(Callback):
    """Writes ``run.json`` when training begins, every two seconds, and at the end, however that comes.

    Times and the highest step go into checkpoints, so that the record of a resumed run is of all its parts.
    A step's time is that from its first batch's arrival to its end, without loading, validation and
    checkpoints; steps that somebody watches, such as a ledger, do not count.

    Args:
        folder: of the run.
        recipe: the recipe's name.
        seed: what random numbers begin with.
    """

    def __init__(self, folder: Path, recipe: str, seed: int | None) -> None:
        study = json.loads(os.environ.get(STUDY_VARIABLE, "{}"))
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._path = folder / NAME
        self._record = RunRecord(recipe, "running", started, seed=seed, study=study)
        self._step_seconds: list[float] = []
        self._seconds_before = 0.0
        self._began: float | None = None
        self._written = -math.inf
        self._batch_began: float | None = None
        self._open_seconds = 0.0
        self._watched = False
        self._trainer: weakref.ref[pl.Trainer] | None = None

    # ------------------------------------------------------------------ what checkpoints keep

    def state_dict(self) -> dict[str, Any]:
        """The record so far, and each step's time."""
        self._update()
        return {
            "record": self._record.to_dict(),
            "step_seconds": torch.tensor(self._step_seconds, dtype=torch.float64),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the record of the run's earlier parts."""
        earlier = RunRecord.from_dict(state_dict["record"])
        self._step_seconds = state_dict["step_seconds"].tolist()
        self._seconds_before = earlier.seconds
        self._record = replace(
            earlier, state="running", reason="", num_parts=earlier.num_parts + 1, study=self._record.study
        )

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training begins, or goes on: later than the state was restored."""
        self._began = time.monotonic()
        self._trainer = weakref.ref(trainer)
        load = load_average()
        described = {
            **environment(pl_module.device),
            "num_cpus": str(num_cpus()),
            "num_threads": str(torch.get_num_threads()),
            "load_average": "not known" if load is None else f"{load:.2f}",
        }
        self._record = replace(self._record, total_steps=_total_steps(trainer), environment=described)
        _describe_in_wandb(trainer, self._record)
        self._write(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The clock runs from here."""
        self._watched |= is_watched()
        if self._times_this_step(trainer, pl_module):
            self._batch_began = time.perf_counter()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        """Whoever watches does so by now."""
        self._watched |= is_watched()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """To here; of batches whose gradients are accumulated, the step's time is the sum."""
        if self._batch_began is not None:
            _wait_for(pl_module.device)
            self._open_seconds += time.perf_counter() - self._batch_began
        self._watched |= is_watched()
        if not should_accumulate(trainer):
            if self._batch_began is not None and not self._watched:
                self._step_seconds.append(self._open_seconds)
            self._batch_began, self._open_seconds, self._watched = None, 0.0, False
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            with suppress(OSError):  # whatever matters meets the same trouble, and says so
                self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All steps are done."""
        self._seconds_before, self._began = self._seconds(), None
        self._write(trainer, state="trained")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Say why; training did not begin yet where somebody has refused it."""
        stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))
        reason = "" if stopped else " ".join(f"{type(exception).__name__}: {exception}".split())
        with suppress(OSError):  # must not hide the exception that matters
            self._write(trainer, state="interrupted" if stopped else "failed", reason=reason)

    def finish(self, trainer: pl.Trainer) -> None:
        """Nothing is left to be done.

        Args:
            trainer: the one that has trained.
        """
        self._trainer = weakref.ref(trainer)
        self._write(trainer, state="finished")

    # ------------------------------------------------------------------ inside

    def _times_this_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if pl_module.device.type == "cpu":
            return True
        if self._open_seconds == 0 and trainer.global_step % _TIMED_ON_ACCELERATOR:
            return False
        _wait_for(pl_module.device)
        return True

    def _seconds(self) -> float:
        return self._seconds_before + (0.0 if self._began is None else time.monotonic() - self._began)

    def _update(self) -> None:
        """Take up what has changed since."""
        times, trainer = self._step_seconds, self._trainer() if self._trainer is not None else None
        self._record = replace(
            self._record,
            seconds=round(self._seconds(), 3),
            step_seconds=median(times) if times else None,
            num_timed_steps=len(times),
        )
        if trainer is None:
            return
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        logged = {
            name: number
            for name, number in numbers.items()
            if math.isfinite(number) and not name.startswith("memory/")
        }
        self._record = replace(
            self._record, num_steps=trainer.global_step, metrics={**self._record.metrics, **logged}
        )
        for profiler in (one for one in _callbacks(trainer) if isinstance(one, MemoryProfiler)):
            highest: MemoryBreakdown | None = profiler.breakdowns.get("fit")
            if highest is not None and highest.peak_bytes > (self._record.peak_bytes or -1):
                self._record = replace(
                    self._record,
                    ledger_peak_bytes=highest.ledger_peak_bytes,
                    allocator_peak_bytes=highest.allocator_peak_bytes,
                    at_peak={name: size for name, size in highest.at_peak.to_dict().items() if size},
                )

    def _write(self, trainer: pl.Trainer, state: str = "running", reason: str = "") -> None:
        self._written = time.monotonic()
        self._update()
        self._record = replace(self._record, state=state, reason=reason)
        if not trainer.is_global_zero:
            return
        if state != "running" and self._trainer is not None:
            records = tuple(record.to_dict() for record in technique_records(trainer))
            self._record = replace(self._record, techniques=records)
        write_atomically(self._path, json.dumps(self._record.to_dict(), indent=1) + "\n")


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _total_steps(trainer: pl.Trainer) -> int | None:
    """By hand, since asking for ``estimated_stepping_batches`` changes what Lightning restores."""
    ends: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        steps_per_epoch = math.inf
        if math.isfinite(trainer.num_training_batches):
            steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        ends.append(trainer.max_epochs * steps_per_epoch)
    if trainer.max_steps >= 0:
        ends.append(trainer.max_steps)
    end = min(ends, default=math.inf)
    return int(end) if math.isfinite(end) else None


def _describe_in_wandb(trainer: pl.Trainer, record: RunRecord) -> None:
    """Put techniques with their settings into the configuration of W&B runs, which are filtered by it."""
    if not trainer.is_global_zero:
        return
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if any(cls.__name__ == "WandbLogger" for cls in type(logger).__mro__):
            techniques = technique_records(trainer)
            describe(logger, techniques, recipe=record.recipe, seed=record.seed, **record.study)
