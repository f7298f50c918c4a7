"""Checks of arguments that several subpackages take. Each names the argument as it is passed: by keyword."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from lightning_memtrain.core.arguments.argument_error import ArgumentError

if TYPE_CHECKING:
    import torch


def wrong(owner: str, name: str, expected: str, value: object, cure: str) -> ArgumentError:
    """The error for a value that is wrong in itself.

    Args:
        owner: what the user has called.
        name: of the argument.
        expected: what it must be.
        value: what came.
        cure: what to do, in a sentence.

    Returns:
        The error.

    Example:
        >>> print(wrong("Every", "k", "a whole number of at least 1", 0, "Use e.g. 2."))
        `Every(k)` must be a whole number of at least 1, but got k=0. Use e.g. 2.
    """
    return ArgumentError(f"`{owner}({name})` must be {expected}, but got {name}={_shown(value)}. {cure}")


def is_whole(value: object) -> bool:
    """Whether something is a whole number; ``True``, ``False`` and ``2.0`` are none.

    Args:
        value: anything.

    Returns:
        Whether it is.
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_counts(owner: str, least: int | None = 1, cure: str | None = None, **values: Any) -> None:
    """Refuse what is no whole number.

    Args:
        owner: what the user has called.
        least: the lowest; ``None`` if there is none.
        cure: what to do, in a sentence.
        **values: the arguments.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, value in values.items():
        if not is_whole(value) or (least is not None and value < least):
            expected = "a whole number" if least is None else f"a whole number of at least {least}"
            raise wrong(owner, name, expected, value, cure or f"Use e.g. {(least or 0) + 1}.")


def check_numbers(
    owner: str, expected: str, holds: Callable[[float], bool], cure: str, **values: Any
) -> None:
    """Refuse what is no finite number, or lies outside its range.

    Args:
        owner: what the user has called.
        expected: what it must be, e.g. ``"a number of at least 0"``.
        holds: whether a finite number is right.
        cure: what to do, in a sentence.
        **values: the arguments; a tensor of one element is a number, too, as torch's optimizers take them.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, value in values.items():
        number = value.item() if _is_of_torch(value, "Tensor") and value.numel() == 1 else value
        if (
            isinstance(number, bool)
            or not isinstance(number, Real)
            or not math.isfinite(number)
            or not holds(float(number))
        ):
            raise wrong(owner, name, expected, value, cure)


def check_flags(owner: str, **values: Any) -> None:
    """Refuse what is neither ``True`` nor ``False``; 0 and 1 are none.

    Args:
        owner: what the user has called.
        **values: the arguments.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise wrong(owner, name, "True or False", value, "Use one of them.")


def check_choices(owner: str, choices: Iterable[Any], **values: Any) -> None:
    """Refuse what is none of some words.

    Args:
        owner: what the user has called.
        choices: the words.
        **values: the arguments.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    words = tuple(choices)
    for name, value in values.items():
        if not any(type(value) is type(word) and value == word for word in words):
            raise wrong(owner, name, " or ".join(map(repr, words)), value, "Use one of them.")


def check_kinds(owner: str, kinds: type | tuple[type, ...], expected: str, cure: str, **values: Any) -> None:
    """Refuse what is no instance of some classes.

    Args:
        owner: what the user has called.
        kinds: the classes.
        expected: what it must be, e.g. ``"a ScalerConfig or None"``.
        cure: what to do, in a sentence.
        **values: the arguments.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, value in values.items():
        if not isinstance(value, kinds):
            raise wrong(owner, name, expected, value, cure)


def check_modules(owner: str, **values: Any) -> None:
    """Refuse what is no module of torch.

    Args:
        owner: what the user has called.
        **values: the arguments.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    from torch import nn

    check_kinds(owner, nn.Module, "a torch.nn.Module", "Pass the model itself, not its class.", **values)


def check_functions(owner: str, *, optional: bool = False, **values: Any) -> None:
    """Refuse what cannot be called.

    Args:
        owner: what the user has called.
        optional: whether ``None`` is right, too.
        **values: the arguments.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, value in values.items():
        if not callable(value) and not (optional and value is None):
            expected = "a function or None" if optional else "a function"
            raise wrong(owner, name, expected, value, "Pass the function itself, not its result.")


def check_optimizer(owner: str, **values: Any) -> None:
    """Refuse what is no optimizer.

    Args:
        owner: what the user has called.
        **values: the arguments; anything with ``param_groups`` and ``step`` is one.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, value in values.items():
        if not _is_optimizer(value):
            cure = "Pass the optimizer itself, not its class."
            raise wrong(owner, name, "an optimizer of torch, or one like them", value, cure)


def check_optimizers(owner: str, **values: Any) -> None:
    """Refuse what is no list of optimizers.

    Args:
        owner: what the user has called.
        **values: the arguments.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, value in values.items():
        listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        if not listed or not all(map(_is_optimizer, value)):
            raise wrong(owner, name, "a list of optimizers", value, "Write e.g. [optimizer]; () is none.")


def as_device(owner: str, **values: Any) -> torch.device:
    """Read a device.

    Args:
        owner: what the user has called.
        **values: the argument: a device, its name or its number.

    Returns:
        The device.

    Raises:
        ArgumentError: naming the argument.

    Example:
        >>> as_device("MemoryLedger", device="cuda:1")
        device(type='cuda', index=1)
    """
    import torch

    ((name, value),) = values.items()
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        expected = "a device of torch or its name"
        raise wrong(owner, name, expected, value, "Use e.g. 'cpu', 'cuda' or 'cuda:1'.") from error


def _is_optimizer(value: Any) -> bool:
    # By what it can do: users and other libraries have wrappers that are no `torch.optim.Optimizer`.
    return not isinstance(value, type) and hasattr(value, "param_groups") and hasattr(value, "step")


def _shown(value: object) -> str:
    """A value in one line; of a model, a tensor or a long list what it is."""
    if _is_of_torch(value, "nn.Module") or _is_of_torch(value, "Tensor"):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_of_torch(value: Any, name: str) -> bool:
    """Whether a value is of a class of torch; none is while nobody has imported torch (it takes seconds)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, attrgetter(name)(torch))
