"""Running something around every call of a module's `training_step`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule


def wrap_training_step(
    model: LightningModule, around: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> Callable[[], None]:
    """Let every call of ``training_step`` go through a function.

    The loop, the strategies and other callbacks see the method that they saw before; chunks of a batch come
    by one after the other.

    Args:
        model: the module that is trained.
        around: called with the method, its arguments and its keyword arguments; returns what it returns.

    Returns:
        A function that takes it back.
    """
    replaced = model.__dict__.get("training_step")
    inner = model.training_step

    @functools.wraps(inner)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        return around(inner, args, kwargs)

    model.__dict__["training_step"] = training_step

    def undo() -> None:
        if model.__dict__.get("training_step") is training_step:
            if replaced is None:
                del model.__dict__["training_step"]
            else:
                model.__dict__["training_step"] = replaced

    return undo
