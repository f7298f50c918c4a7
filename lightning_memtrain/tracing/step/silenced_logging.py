"""What a step reports to others, dropped while it is not a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torchmetrics import Metric

from lightning_memtrain.compat.lightning_private import trainer_of
from lightning_memtrain.core import without_frames
from lightning_memtrain.tracing.step.recorded_values import UnknownValueError


@contextmanager
def logging_silenced(model: nn.Module, names: set[str] | None = None) -> Iterator[list[UnknownValueError]]:
    """Run a step whose `self.log` does nothing, whose loggers log nothing, and that calls no callback.

    Metrics run, since they may be losses, too; one that asks for values returns zero.

    Args:
        model: the module that is trained.
        names: gets those of what would have been logged.

    Yields:
        The questions that metrics could not answer, so far.
    """
    logged: set[str] = set() if names is None else names
    unknown: list[UnknownValueError] = []
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def put(place: dict[str, Any], name: str, value: Any) -> None:
        undo.append((place, name, place.get(name, undo)))
        place[name] = value

    # Of either package that Lightning comes in.
    if any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        put(model.__dict__, "log", lambda name=None, *args, **kwargs: logged.add(str(name)))
        put(model.__dict__, "log_dict", lambda dictionary=(), *args, **kwargs: logged.update(dictionary))
        put(model.__dict__, "print", lambda *args, **kwargs: None)
        trainer = trainer_of(model)
        if trainer is not None:
            put(trainer.__dict__, "_loggers", [DummyLogger() for _ in trainer.loggers])
            put(trainer.__dict__, "callbacks", [])
    answer_metrics(model, unknown, put)
    try:
        yield unknown
    finally:
        for place, name, value in reversed(undo):
            if value is undo:
                place.pop(name, None)
            else:
                place[name] = value


def answer_metrics(
    model: nn.Module, unknown: list[UnknownValueError], put: Callable[[dict[str, Any], str, Any], None]
) -> None:
    """Let metrics run, and return zero where they ask for values that nobody knows.

    Args:
        model: the module that has them.
        unknown: gets the questions.
        put: puts an attribute into an object's own.
    """
    for module in model.modules():
        if isinstance(module, Metric):
            for name in ("forward", "update", "compute"):
                put(module.__dict__, name, _zero_where_unknown(getattr(module, name), unknown))


def _zero_where_unknown(method: Any, unknown: list[UnknownValueError]) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except UnknownValueError as error:
            without_frames(error)  # whose tensors would be held until the step is over
            unknown.append(error)
            return torch.zeros(())

    return called
