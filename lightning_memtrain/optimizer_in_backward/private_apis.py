"""What Lightning and torch keep private, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer


def accumulates(trainer: Trainer) -> bool:
    """Whether the current batch ends without an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def backward_id() -> int:
    """Which backward is running; one inside of another has a number of its own."""
    return torch._C._current_graph_task_id()


def has_comm_hook(strategy: Any) -> bool:
    """Whether DDP is to communicate through a hook, given to the strategy or put on its wrapper."""
    on_wrapper = getattr(strategy.model, "_comm_hooks", None)
    return getattr(strategy, "_ddp_comm_hook", None) is not None or bool(on_wrapper)


def ddp_options(strategy: Any) -> dict[str, Any]:
    """What DDP is made with."""
    return dict(getattr(strategy, "_ddp_kwargs", {}))


def skip_clipping(plugin: Any) -> Callable[[], None]:
    """Keep a precision plugin from clipping gradients that are gone: torch fails on none.

    Args:
        plugin: the trainer's.

    Returns:
        A function that takes it back.
    """

    def clipped_already(*args: Any, **kwargs: Any) -> None:
        return None

    plugin.clip_gradients = clipped_already

    def undo() -> None:
        vars(plugin).pop("clip_gradients", None)

    return undo
