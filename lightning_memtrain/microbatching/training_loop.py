"""Every touch of what Lightning keeps private, checked once per run against what is expected.

Proven by running with Lightning 2.4 to 2.6. If a release changes one of these names, :func:`check` says so
before training starts; nothing is ever patched blindly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection as ResultCollection
from torch import Tensor

__all__ = ["Backward", "Closure", "ClosureResult", "ResultCollection"]

Backward = Callable[[Tensor], None] | None
"""Backward of a loss, with all hooks; ``None`` if it is to be skipped."""

_EXPECTED = {
    "_make_closure": ["kwargs", "optimizer", "batch_idx"],
    "_make_backward_fn": ["optimizer"],
    "_make_zero_grad_fn": ["batch_idx", "optimizer"],
    "_training_step": ["kwargs"],
    "_optimizer_step": ["batch_idx", "train_step_and_backward_closure"],
}


def check(trainer: Trainer) -> None:
    """Refuse a Lightning whose training loop is not the one this was written for.

    Args:
        trainer: the trainer that is about to fit.

    Raises:
        MisconfigurationException: naming what is missing or different.
    """
    loop = getattr(getattr(trainer.fit_loop, "epoch_loop", None), "automatic_optimization", None)
    different = [] if loop is not None else ["fit_loop.epoch_loop.automatic_optimization"]
    for name, arguments in _EXPECTED.items() if loop is not None else ():
        method = getattr(type(loop), name, None)
        if method is None or list(inspect.signature(method).parameters)[1:] != arguments:
            different.append(f"{type(loop).__name__}.{name}({', '.join(arguments)})")
    if not isinstance(getattr(trainer.fit_loop.epoch_loop, "_results", None), dict):
        different.append("fit_loop.epoch_loop._results")
    if different:
        import lightning

        raise MisconfigurationException(
            "`Microbatching` needs a training loop like that of Lightning 2.4 to 2.6, but Lightning "
            f"{lightning.__version__} lacks {', '.join(different)}. Install lightning>=2.4,<2.7."
        )


def install_closure(trainer: Trainer, make: Callable[[Any, Any, int], Closure]) -> Callable[[], None]:
    """Let the training loop make its closure (forward, zero_grad, backward of a batch) by another function.

    Args:
        trainer: the trainer.
        make: makes a closure from the step's keyword arguments, the optimizer and the batch index.

    Returns:
        A function that takes it back.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    loop._make_closure = make  # type: ignore[method-assign, assignment]

    def undo() -> None:
        if loop.__dict__.get("_make_closure") is make:
            del loop.__dict__["_make_closure"]

    return undo


def install_around_step(trainer: Trainer, around: Callable[[Callable[[], None]], None]) -> Callable[[], None]:
    """Let something be done around each step of the optimizer, its closure included.

    Args:
        trainer: the trainer.
        around: called with a function that takes the step.

    Returns:
        A function that takes it back.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    own = loop._optimizer_step

    def step(batch_idx: int, train_step_and_backward_closure: Callable[[], Tensor | None]) -> None:
        around(lambda: own(batch_idx, train_step_and_backward_closure))

    loop._optimizer_step = step  # type: ignore[method-assign]

    def undo() -> None:
        if loop.__dict__.get("_optimizer_step") is step:
            del loop.__dict__["_optimizer_step"]

    return undo


def uses_static_graph(strategy: Any) -> bool:
    """Whether DDP is to be told that every step runs the same graph."""
    return bool(getattr(strategy, "_ddp_kwargs", {}).get("static_graph", False))


def gradients_are_bucket_views(strategy: Any) -> bool:
    """Whether gradients lie in the buckets that DDP averages."""
    return bool(getattr(getattr(strategy, "model", None), "gradient_as_bucket_view", False))


def log_scalar(trainer: Trainer, name: str, value: float) -> None:
    """Send one number to all loggers, at the step that the trainer counts for them, and to callbacks."""
    trainer.callback_metrics[name] = torch.tensor(value)
    for logger in trainer.loggers:
        logger.log_metrics({name: value}, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def backward_fn(trainer: Trainer, optimizer: Any) -> Callable[[Tensor], None] | None:
    """The loop's own backward, with all its hooks; ``None`` if backward is to be skipped."""
    return trainer.fit_loop.epoch_loop.automatic_optimization._make_backward_fn(optimizer)


def zero_grad_fn(trainer: Trainer, batch_idx: int, optimizer: Any) -> Callable[[], None] | None:
    """The loop's own zero_grad, with all its hooks; ``None`` while gradients are accumulated."""
    return trainer.fit_loop.epoch_loop.automatic_optimization._make_zero_grad_fn(batch_idx, optimizer)


def training_step(trainer: Trainer, kwargs: Any) -> ClosureResult:
    """Forward of one batch through the strategy, as the loop does it."""
    return trainer.fit_loop.epoch_loop.automatic_optimization._training_step(kwargs)


def results(trainer: Trainer) -> Any:
    """The collection that ``self.log`` of the training loop writes to."""
    return trainer.fit_loop.epoch_loop._results


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


@contextmanager
def results_replaced(trainer: Trainer, replacement: Any) -> Iterator[None]:
    """Let ``self.log`` write elsewhere for a while."""
    loop = trainer.fit_loop.epoch_loop
    own = loop._results
    loop._results = replacement
    try:
        yield
    finally:
        loop._results = own


def results_state(collection: Any) -> Any:
    """What to hand to :func:`restore_results`; references only: its tensors are never changed in place."""
    return {key: (metric, dict(metric.__dict__)) for key, metric in collection.items()}


def restore_results(collection: Any, state: Any) -> None:
    """Set a result collection back.

    Args:
        collection: the collection.
        state: of :func:`results_state`.
    """
    collection.clear()
    for key, (metric, attributes) in state.items():
        metric.__dict__.clear()
        metric.__dict__.update(attributes)
        collection[key] = metric


def logged_tensors(trainer: Trainer) -> list[Tensor]:
    """What has been logged so far, as loggers and callbacks see it; nobody writes to these tensors."""
    shown = vars(trainer._logger_connector).values()
    metrics = [value for one in shown if isinstance(one, dict) for value in one.values()]
    return [value for value in metrics if isinstance(value, Tensor)]


def grad_scaler(trainer: Trainer) -> Any:
    """The loss scaler of mixed precision, ``None`` without one."""
    return getattr(trainer.precision_plugin, "scaler", None)
