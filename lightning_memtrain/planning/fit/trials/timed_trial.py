"""A trial on real tensors: how long its chunks take, in a copy of this process and without an update."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_memtrain.compat import wrap_training_step
from lightning_memtrain.compat.lightning_packages import namesake
from lightning_memtrain.planning.fit.seconds.even_clock import EvenClock, Moment
from lightning_memtrain.planning.fit.trials.trial import BatchList, Trial, with_techniques
from lightning_memtrain.planning.prediction.few_steps import few_steps_trainer, quiet_folder
from lightning_memtrain.planning.prediction.forked import ChildFailed, call_in_copy
from lightning_memtrain.tracing.device import Device

_SEVERAL = 3


@dataclass(frozen=True)
class RealSeconds:
    """What a batch took.

    Args:
        chunk: forward and backward of one chunk, with all that goes on around it.
        batch: once for a batch, without the update.
    """

    chunk: float
    batch: float


def time_trial(
    model: pl.LightningModule,
    options: Mapping[str, Any],
    device: Device,
    trial: Trial,
    num_threads: int,
    most_seconds: float,
) -> RealSeconds | None:
    """Run a batch for real, after another one if it has few chunks, and time it.

    Nobody steps the optimizer, so that weights stay those of this process, shared with the copy, and no state
    of the optimizer is made: all that there is in memory are gradients and activations.

    Args:
        model: what is trained, on the CPU.
        options: arguments of Trainer, as the run has them.
        device: the CPU.
        trial: what is tried.
        num_threads: that the run has.
        most_seconds: after so many it is given up.

    Returns:
        The seconds; ``None`` if it failed, or was given up.
    """

    def run() -> RealSeconds | None:
        return _in_thread(
            lambda: _time(model, options, device, trial, EvenClock(num_threads)), num_threads, most_seconds
        )

    with suppress(ChildFailed):
        return call_in_copy(run)
    return None


def _in_thread(
    function: Callable[[], RealSeconds | None], num_threads: int, most_seconds: float
) -> RealSeconds | None:
    """Call it in a new thread, which can have helpers of its own: those of the forked one are gone."""
    found: list[RealSeconds | None] = []

    def call() -> None:
        torch.set_num_threads(num_threads)
        with suppress(Exception):  # the model may do what it likes: then nothing was measured
            found.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(most_seconds)
    return found[0] if found else None


def _time(
    model: pl.LightningModule, options: Mapping[str, Any], device: Device, trial: Trial, clock: EvenClock
) -> RealSeconds | None:
    warnings.simplefilter("ignore")  # the real run gives them
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given = {**with_techniques(model, options, device, trial), "accumulate_grad_batches": 1}
    watch = _Stopwatch(clock)
    with quiet_folder() as folder:
        kinds = namesake(SingleDeviceStrategy, model), namesake(CPUAccelerator, model)
        strategy = kinds[0](torch.device("cpu"), kinds[1]())
        place = {"strategy": strategy, "devices": 1, "default_root_dir": folder}
        # Of several chunks the first one does for what is only done once.
        batches = [trial.first_batch, trial.batch] if trial.num_chunks < _SEVERAL else [trial.batch]
        trainer = few_steps_trainer(model, place, given, watch, len(batches), max_epochs=1)
        trial.progress.give_to(trainer)
        trainer.fit(model, BatchList(batches))
    return watch.seconds()


class _Stopwatch(pl.Callback):
    """Times the chunks of the last batch; optimizers only call their closure."""

    def __init__(self, clock: EvenClock) -> None:
        self._clock = clock
        self._undo = ExitStack()
        self._begins: list[Moment] = []
        self._start = self._chunks_end = self._end = clock.now()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.callback(wrap_training_step(pl_module, self._around))
        for optimizer in trainer.optimizers:
            vars(optimizer)["step"] = self._evaluate

    def _evaluate(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        loss = None if closure is None else closure()
        self._chunks_end = self._clock.now()
        return loss

    def _around(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._begins.append(self._clock.now())
        return step(*args, **kwargs)

    def on_train_batch_start(self, *args: Any) -> None:
        self._clock.calibrate()
        self._begins, self._start = [], self._clock.now()

    def on_train_batch_end(self, *args: Any) -> None:
        self._end = self._clock.now()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()

    def seconds(self) -> RealSeconds | None:
        """What the last batch took; ``None`` if its chunks did not end as usual."""
        begins, between = self._begins, self._clock.between
        if not begins or self._chunks_end.seconds <= begins[-1].seconds:
            return None
        # The first of several makes the gradients.
        first = 1 if len(begins) >= _SEVERAL else 0
        return RealSeconds(
            between(begins[first], self._chunks_end) / (len(begins) - first),
            between(self._start, begins[0]) + between(self._chunks_end, self._end),
        )
