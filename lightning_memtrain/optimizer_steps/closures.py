"""Optimizers that evaluate the model during their step, by a closure."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_memtrain.compat.torch_private import version_counter

_CLOSURE = "closure"


class EvaluatesModelError(RuntimeError):
    """An optimizer wants the model evaluated where this has been done already, and not by itself."""


class EvaluatedClosure:
    """Stands for the closure of a model that has been evaluated: gives what that returned, once.

    Optimizers that evaluate once, before they change anything, get what they would have got. Others would
    step along gradients of other weights than they mean.

    Args:
        result: of the evaluation.
        parameters: those that the optimizer steps, with the gradients that the evaluation gave.

    Raises:
        EvaluatesModelError: when called again, or after a weight or gradient has changed.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> closure = EvaluatedClosure(0.25, [weight])
        >>> torch.optim.SGD([weight], lr=0.5).step(closure), weight.item()
        (0.25, 0.5)
        >>> try:
        ...     closure()
        ... except EvaluatesModelError as error:
        ...     print(error)
        its closure is called again within a step
    """

    def __init__(self, result: Any, parameters: Iterable[Tensor]) -> None:
        self._result = result
        self._called = False
        self._as_evaluated = [(p, version_counter(p), p.grad, _version(p.grad)) for p in parameters]

    def __call__(self) -> Any:
        """What the evaluation returned."""
        if self._called:
            raise EvaluatesModelError("its closure is called again within a step")
        for parameter, version, gradient, gradient_version in self._as_evaluated:
            if version_counter(parameter) != version:
                raise EvaluatesModelError("its closure is called after weights have changed")
            if parameter.grad is not gradient or _version(gradient) != gradient_version:
                raise EvaluatesModelError("its closure is called after gradients have changed")
        self._called = True
        return self._result


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else version_counter(gradient)


def takes_closure(optimizer: Optimizer) -> bool:
    """Whether a closure can be handed to an optimizer's step by name, as Lightning does.

    Args:
        optimizer: any.

    Returns:
        ``False`` for steps without arguments.
    """
    parameters = _parameters(type(optimizer).step).values()
    return any(p.name == _CLOSURE or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer evaluates the model during its step.

    Args:
        optimizer: any.

    Returns:
        Whether its step cannot do without a closure: it is LBFGS, it has no default for it, or calls it
        whether there is one or not, as sharpness-aware minimization does.
    """
    if isinstance(optimizer, LBFGS):
        return True
    closure = _parameters(type(optimizer).step).get(_CLOSURE)
    if closure is None:
        return False
    return closure.default is inspect.Parameter.empty or _calls_it_always(type(optimizer).step)


@lru_cache(maxsize=256)
def _parameters(step: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(step).parameters


@lru_cache(maxsize=256)
def _calls_it_always(step: Callable[..., Any]) -> bool:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(step)))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # made without a file: the step itself will tell
        return False
    tests = [node for node in ast.walk(definition) if isinstance(node, ast.If) and _names_closure(node.test)]
    if any(_provides(node) for test in tests for node in ast.walk(test)):
        return False
    insists = any(_is_absence(test.test) and isinstance(test.body[0], ast.Raise) for test in tests)
    asserts = [node.test for node in ast.walk(definition) if isinstance(node, ast.Assert)]
    return insists or any(map(_is_presence, asserts)) or any(map(_calls_closure, _always_run(definition)))


def _always_run(definition: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function that no test for its closure, ``try`` or function of its own is around."""
    for node in ast.iter_child_nodes(definition):
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.Try)):
            continue
        if isinstance(node, (ast.If, ast.IfExp)) and _names_closure(node.test):
            continue
        if isinstance(node, ast.BoolOp) and _names_closure(node):
            continue
        yield node
        yield from _always_run(node)


def _names_closure(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == _CLOSURE for inner in ast.walk(node))


def _calls_closure(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == _CLOSURE


def _provides(node: ast.AST) -> bool:
    """Whether a step goes another way, or takes another closure, where there is none."""
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == _CLOSURE for target in node.targets)
    return isinstance(node, ast.Return)


def _is_presence(test: ast.expr) -> bool:
    return ast.unparse(test) in (_CLOSURE, f"{_CLOSURE} is not None", f"callable({_CLOSURE})")


def _is_absence(test: ast.expr) -> bool:
    return ast.unparse(test) in (f"not {_CLOSURE}", f"{_CLOSURE} is None", f"not callable({_CLOSURE})")
