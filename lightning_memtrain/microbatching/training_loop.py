"""What microbatching asks of Lightning's training loop; private names are those of ``compat``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memtrain.compat.lightning_private import (
    OPTIMIZER_STEP,
    Closure,
    ClosureResult,
    ResultCollection,
    backward_fn,
    ddp_options,
    install_closure,
    log_scalar,
    logged_tensors,
    restore_results,
    results,
    results_replaced,
    results_state,
    training_step,
    zero_grad_fn,
)
from lightning_memtrain.compat.lightning_private import check_closures as check

__all__ = [
    "Backward",
    "Closure",
    "ClosureResult",
    "ResultCollection",
    "backward_fn",
    "check",
    "install_closure",
    "log_scalar",
    "logged_tensors",
    "restore_results",
    "results",
    "results_replaced",
    "results_state",
    "training_step",
    "zero_grad_fn",
]

Backward = Callable[[Tensor], None] | None
"""Backward of a loss, with all hooks; ``None`` if it is to be skipped."""


def install_around_step(trainer: Trainer, around: Callable[[Callable[[], None]], None]) -> Callable[[], None]:
    """Let something be done around each step of the optimizer, its closure included.

    Args:
        trainer: the trainer.
        around: called with a function that takes the step.

    Returns:
        A function that takes it back.
    """
    loop = OPTIMIZER_STEP.holder(trainer)
    own = OPTIMIZER_STEP.of(trainer)

    def step(batch_idx: int, train_step_and_backward_closure: Callable[[], Tensor | None]) -> None:
        around(lambda: own(batch_idx, train_step_and_backward_closure))

    loop._optimizer_step = step

    def undo() -> None:
        if vars(loop).get("_optimizer_step") is step:
            del vars(loop)["_optimizer_step"]

    return undo


def uses_static_graph(strategy: Any) -> bool:
    """Whether DDP is to be told that every step runs the same graph."""
    return bool(ddp_options(strategy).get("static_graph", False))


def gradients_are_bucket_views(strategy: Any) -> bool:
    """Whether gradients lie in the buckets that DDP averages."""
    return bool(getattr(getattr(strategy, "model", None), "gradient_as_bucket_view", False))


@contextmanager
def log_watched(model: LightningModule, before: Callable[[str, Any], None]) -> Iterator[None]:
    """Look at each value that is logged, as it was passed to ``self.log``, which hands copies on.

    Args:
        model: the module whose ``log`` is meant.
        before: called with the name and the value.
    """
    found, own = vars(model).get("log"), model.log

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        before(name, value)
        own(name, value, *args, **kwargs)

    vars(model)["log"] = log
    try:
        yield
    finally:
        del vars(model)["log"]
        if found is not None:
            vars(model)["log"] = found


def grad_scaler(trainer: Trainer) -> Any:
    """The loss scaler of mixed precision, ``None`` without one."""
    return getattr(trainer.precision_plugin, "scaler", None)
