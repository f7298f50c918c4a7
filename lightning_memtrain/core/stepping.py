"""Steps of an optimizer in parts: one parameter, or some of them, at a time."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer


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
            step(optimizer)
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
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    step: Any = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    # A step that calls that of a parent class would come upon the hooks again.
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield step
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer evaluates the model during its step.

    Args:
        optimizer: any.

    Returns:
        Whether its step cannot do without a closure.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return required or isinstance(optimizer, LBFGS)


def shared_state(optimizer: Optimizer) -> dict[str, float]:
    """What an optimizer keeps besides the state of its parameters, as far as it is made of numbers.

    Args:
        optimizer: any.

    Returns:
        Each number by its place. Those that a step changes make a step in parts differ from a whole one.
    """
    places: list[tuple[str, dict[Any, Any]]] = [("its attributes", vars(optimizer))]
    places += [(f"param_groups[{i}]", group) for i, group in enumerate(optimizer.param_groups)]
    places += [("state", {k: v for k, v in optimizer.state.items() if not isinstance(k, Tensor)})]
    return {
        f"{place}[{key!r}]": float(value)
        for place, values in places
        for key, value in values.items()
        if (isinstance(value, (int, float)) and not isinstance(value, bool))
        or (isinstance(value, Tensor) and value.numel() == 1)
    }


def changed_shared_state(before: dict[str, float], optimizer: Optimizer) -> list[str]:
    """Where an optimizer has changed what it keeps across parameters.

    Args:
        before: of :func:`shared_state`.
        optimizer: the same optimizer, later.

    Returns:
        The places, sorted.
    """
    after = shared_state(optimizer)
    return sorted(key for key in after if key not in before or before[key] != after[key])
