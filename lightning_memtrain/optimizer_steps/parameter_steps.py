"""Steps of an optimizer in parts: one parameter, or some of them, at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memtrain.optimizer_steps.closures import EvaluatedClosure, EvaluatesModelError, takes_closure
from lightning_memtrain.optimizer_steps.partial_steps import why_no_partial_steps
from lightning_memtrain.optimizer_steps.step_hooks import unhooked_step

# Their classes treat each parameter by itself, and know it by its identity.
_ONLY_LOOK_AT_GROUPS = ("torch.optim.", "torchao.optim.", "lightning_memtrain.")


@runtime_checkable
class SupportsParameterStep(Protocol):
    """A precision plugin that has a way of its own to step an optimizer, and can step one parameter by it."""

    def step_parameter(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Step one parameter that has a gradient, and no other; the gradient stays.

        The optimizer's step as a whole comes afterwards, without gradients; hooks and schedulers see that.

        Args:
            optimizer: one of the run's.
            parameter: one of the optimizer's, of any shape and floating-point dtype.
        """


def step_parameter(optimizer: Optimizer, parameter: Tensor) -> None:
    """Step one parameter by the optimizer's own code; hooks and schedulers do not see it.

    Args:
        optimizer: any that treats each parameter by itself.
        parameter: one of its parameters, of any shape and floating-point dtype; its gradient stays.

    Raises:
        MisconfigurationException: if the optimizer evaluates the model during its step.

    Example:
        >>> first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> optimizer = torch.optim.SGD([first, second], lr=0.5)
        >>> (first + second).sum().backward()
        >>> step_parameter(optimizer, first)
        >>> first.item(), second.item(), second.grad.item()
        (0.5, 1.0, 1.0)
    """
    step_parameters(optimizer, [parameter])


@torch.no_grad()
def step_parameters(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Step some parameters by the optimizer's own code, as :func:`step_parameter` steps one.

    Takes time by the number of parameters that are stepped, if the optimizer is of torch, torchao or this
    library; others find all their parameters, and look at each.

    Args:
        optimizer: any that treats each parameter by itself.
        parameters: some of its parameters, of any shapes and floating-point dtypes; their gradients stay.

    Raises:
        MisconfigurationException: if the optimizer evaluates the model during its step.
    """
    if reason := why_no_partial_steps(optimizer):
        raise _refused(optimizer, reason)
    known = type(optimizer).__module__.startswith(_ONLY_LOOK_AT_GROUPS)
    try:
        narrowed = _only_in_groups if known else _only_with_gradients
        with narrowed(optimizer, parameters), unhooked_step(optimizer) as step:
            if known or not takes_closure(optimizer):
                step(optimizer)
            else:
                step(optimizer, closure=EvaluatedClosure(None, list(parameters)))
    except EvaluatesModelError as error:
        raise _refused(optimizer, str(error)) from error


def _refused(optimizer: Optimizer, reason: str) -> Exception:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return MisconfigurationException(
        "Parameters can be stepped one by one only by an optimizer that steps without evaluating the model, "
        f"but got {type(optimizer).__name__}: {reason}. Use another optimizer."
    )


@contextmanager
def _only_in_groups(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Leave only some parameters in an optimizer's groups."""
    groups = optimizer.param_groups
    chosen: dict[int, tuple[dict[str, Any], list[Tensor]]] = {}
    if len(groups) == 1:
        chosen[0] = groups[0], list(parameters)
    else:
        for parameter in parameters:
            group = _group_of(optimizer, parameter)
            chosen.setdefault(id(group), (group, []))[1].append(parameter)
    whole = [(group, group["params"]) for group, _ in chosen.values()]
    for group, some in chosen.values():
        group["params"] = some
    optimizer.param_groups = [group for group, _ in chosen.values()]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, params in whole:
            group["params"] = params


@contextmanager
def _only_with_gradients(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Leave gradients only to some parameters: some optimizers know them by their place in the groups."""
    stepped = {id(parameter) for parameter in parameters}
    others = [
        (p, p.grad)
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) not in stepped and p.grad is not None
    ]
    for other, _ in others:
        other.grad = None
    try:
        yield
    finally:
        for other, gradient in others:
            other.grad = gradient


# Where the parameters of optimizers are: number of the group and place in it, by identity.
_places: WeakKeyDictionary[Optimizer, dict[int, tuple[int, int]]] = WeakKeyDictionary()


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    groups = optimizer.param_groups
    number, place = _places.get(optimizer, {}).get(id(parameter), (0, 0))
    # Groups may have been added, and parameters may have taken the identity of others that are gone.
    params = groups[number]["params"] if number < len(groups) else []
    if place >= len(params) or params[place] is not parameter:
        _places[optimizer] = {
            id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])
        }
        number, _ = _places[optimizer][id(parameter)]
    return groups[number]
