"""Running ways for real, for `benchmarks/planning.py`: peaks of the allocator, and seconds in turn."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.planning_models import MODELS
from lightning_memtrain import MemoryProfiler
from lightning_memtrain.planning.fit.way import TechniqueSettings, Way
from lightning_memtrain.planning.prediction.forked import call_in_copy

#: Makes arguments of Trainer, anew for each run.
Make = Callable[[], dict[str, Any]]
_ANSWER_BYTES = 64


def made(one: Any) -> Any:
    """The object that a technique's settings, or a nested ``class_path``, name."""
    if isinstance(one, TechniqueSettings):
        one = {"class_path": one.class_path, "init_args": one.init_args}
    if not isinstance(one, Mapping) or "class_path" not in one:
        return one
    module, _, name = one["class_path"].rpartition(".")
    arguments = one.get("init_args") or {}
    return getattr(importlib.import_module(module), name)(
        **{key: made(value) for key, value in arguments.items()}
    )


def arguments_of(way: Way) -> Make:
    """What Trainer is given for a way."""

    def make() -> dict[str, Any]:
        return {
            place: [made(one) for one in way.techniques if one.place == place]
            for place in ("callbacks", "plugins")
            if any(one.place == place for one in way.techniques)
        }

    return make


class _Repeated(torch.utils.data.IterableDataset[Any]):
    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Any:
        return itertools.repeat(self._batch)


def _fit(name: str, make: Make, watch: pl.Callback, num_steps: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    arguments = make()
    prepare = arguments.pop("prepare", None)
    batch_size = arguments.pop("batch_size", None)
    if prepare is not None:
        prepare(model)
    if batch_size is not None:
        batch = tuple(one[:batch_size] for one in batch)
    callbacks = [*arguments.pop("callbacks", ()), watch]
    trainer = pl.Trainer(
        max_steps=num_steps * (1 if model.automatic_optimization else 2),
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )
    trainer.fit(model, DataLoader(_Repeated(batch), batch_size=None))


def peak_bytes(name: str, make: Make) -> int:
    """Most bytes that the allocator handed out in three steps, in a copy of this process."""

    def train() -> int:
        with (
            tempfile.TemporaryDirectory() as folder,
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            watch = MemoryProfiler(every_n_steps=1, report_dir=folder)
            _fit(name, make, watch, 3, folder)
        assert watch.report is not None
        return int(watch.report.stages["fit"].allocator_peak_bytes or 0)

    return call_in_copy(train)


class _Gate(pl.Callback):
    """Waits for a word before each step of the optimizer's, and answers how long the one before took."""

    def __init__(self, reading: int, writing: int, num_batches: int) -> None:
        self._reading, self._writing, self._num_batches = reading, writing, num_batches
        self._batches, self._start = 0, 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        if self._batches % self._num_batches == 0:
            os.read(self._reading, 1)
            self._start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self._batches += 1
        if self._batches % self._num_batches == 0:
            spent = time.process_time() - self._start
            os.write(self._writing, pickle.dumps(spent).ljust(_ANSWER_BYTES))


class _Runner:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, make: Make, num_steps: int) -> None:
        (reading, self._telling), (self._hearing, writing) = os.pipe(), os.pipe()
        self._process = os.fork()
        if self._process == 0:
            try:
                os.close(self._telling)
                os.close(self._hearing)
                torch.set_num_threads(1)
                accumulated = make().get("accumulate_grad_batches", 1)
                with tempfile.TemporaryDirectory() as folder:
                    _fit(name, make, _Gate(reading, writing, accumulated), num_steps, folder)
            finally:
                os._exit(0)
        os.close(reading)
        os.close(writing)

    def step(self) -> float:
        """Seconds of a step."""
        os.write(self._telling, b"x")
        return float(pickle.loads(os.read(self._hearing, _ANSWER_BYTES)))

    def end(self) -> None:
        """Wait for its end."""
        os.close(self._telling)
        os.close(self._hearing)
        os.waitpid(self._process, 0)


def seconds_in_turn(
    name: str, ways: Mapping[str, Make], num_rounds: int, side_by_side: bool
) -> dict[str, list[float]]:
    """Processor seconds of steps, one way after the other, round after round; first steps do not count.

    Args:
        name: of the model.
        ways: by any name.
        num_rounds: steps of each.
        side_by_side: whether all processes may be there at once; else each is made anew for each round.

    Returns:
        The seconds of each way in the order of rounds.
    """
    spent: dict[str, list[float]] = {key: [] for key in ways}
    if side_by_side:
        runners = {key: _Runner(name, make, num_rounds + 1) for key, make in ways.items()}
        for turn, (key, runner) in itertools.product(range(num_rounds + 1), runners.items()):
            seconds = runner.step()
            if turn:
                spent[key].append(seconds)
        for runner in runners.values():
            runner.end()
        return spent
    for _, (key, make) in itertools.product(range(num_rounds), ways.items()):
        runner = _Runner(name, make, 2)
        runner.step()
        spent[key].append(runner.step())
        runner.end()
    return spent


def ratios(spent: Mapping[str, Sequence[float]], plain: str = "plain") -> dict[str, float]:
    """The median over rounds of each way's seconds over those of the plain run in the same round."""
    return {
        key: median(one / other for one, other in zip(values, spent[plain], strict=True))
        for key, values in spent.items()
    }
