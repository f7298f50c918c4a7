"""Steps of an optimizer in parts: one parameter, or some of them, at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memtrain.core.closures import (
    EvaluatesModelError,
    SpentClosure,
    needs_closure,
    takes_closure,
)
from lightning_memtrain.core.shared_state import SharedState

__all__ = [
    "StepsParameters",
    "changed_shared_state",
    "needs_closure",
    "own_step",
    "shared_state",
    "step_parameter",
]

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@runtime_checkable
class StepsParameters(Protocol):
    """A precision plugin that has a way of its own to step an optimizer, and can step one parameter by it."""

    def step_parameter(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Step one parameter that has a gradient, and no other; the gradient stays.

        The optimizer's step as a whole comes afterwards, without gradients; hooks and schedulers see that.

        Args:
            optimizer: one of the run's.
            parameter: one of the optimizer's.
        """


@torch.no_grad()
def step_parameter(optimizer: Optimizer, parameter: Tensor) -> None:
    """Step one parameter by the optimizer's own code; hooks and schedulers do not see it.

    Args:
        optimizer: any that treats each parameter by itself.
        parameter: one of its parameters; its gradient stays.

    Raises:
        MisconfigurationException: if the optimizer evaluates the model again during its step.

    Example:
        >>> first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> optimizer = torch.optim.SGD([first, second], lr=0.5)
        >>> (first + second).sum().backward()
        >>> step_parameter(optimizer, first)
        >>> first.item(), second.item(), second.grad.item()
        (0.5, 1.0, 1.0)
    """
    others = [
        (p, p.grad)
        for group in optimizer.param_groups
        for p in group["params"]
        if p is not parameter and p.grad is not None
    ]
    # Groups keep all their parameters: some optimizers know them by their place.
    for other, _ in others:
        other.grad = None
    try:
        with own_step(optimizer) as step:
            if takes_closure(optimizer):
                step(optimizer, closure=SpentClosure(None, [parameter]))
            else:
                step(optimizer)
    except EvaluatesModelError as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        raise MisconfigurationException(
            "Parameters can be stepped one by one only by an optimizer that steps without evaluating the "
            f"model, but got {type(optimizer).__name__}: {error}. Use another optimizer."
        ) from error
    finally:
        for other, gradient in others:
            other.grad = gradient


@contextmanager
def own_step(optimizer: Optimizer) -> Iterator[Callable[..., Any]]:
    """The code of an optimizer's step, without what others have put around it.

    Args:
        optimizer: any; in the block it has no step hooks.

    Yields:
        The ``step`` of its class, to be called with the optimizer.
    """
    # Optimizers that wrap another one and do without the constructor of their class have no hooks.
    hooks = {name: vars(optimizer)[name] for name in _HOOKS if name in vars(optimizer)}
    step: Any = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    # A step that calls that of a parent class would come upon the hooks again.
    vars(optimizer).update((name, OrderedDict()) for name in hooks)
    try:
        yield step
    finally:
        vars(optimizer).update(hooks)


def shared_state(optimizer: Optimizer) -> SharedState:
    """What an optimizer keeps besides the state of its parameters.

    Args:
        optimizer: any.

    Returns:
        What there is now. A step in parts differs from a whole one where a step changes it.
    """
    return SharedState(optimizer)


def changed_shared_state(before: SharedState, optimizer: Optimizer) -> list[str]:
    """Where an optimizer has changed what it keeps across parameters.

    This is the test of all techniques for whether an optimizer may be stepped in parts.

    Args:
        before: of :func:`shared_state`.
        optimizer: the same optimizer, later.

    Returns:
        The places, sorted.
    """
    assert before.optimizer is optimizer
    return before.changed()
