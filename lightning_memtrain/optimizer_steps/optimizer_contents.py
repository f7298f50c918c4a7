"""What an optimizer contains, in any nesting of containers, objects and other optimizers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, MutableMapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_memtrain.compat.lightning_packages import PACKAGES

# Code, and what leads out of the optimizer into the rest of the program.
_OPAQUE = (
    *(type, ModuleType, FunctionType, MethodType, BuiltinFunctionType),
    *(logging.Logger, torch.Generator, Dataset, DataLoader),
)
_OPAQUE_PACKAGES = {*PACKAGES, "threading"}
_CONTAINERS = (list, tuple, deque, set, frozenset)


class Container(NamedTuple):
    """A container or object that an optimizer reaches.

    Args:
        path: where it is, as one would write it after ``optimizer.``; empty for the optimizer itself.
        value: the dictionary, list, tuple, deque, set or object.
        items: what it contains, by key, index or name of the attribute.
    """

    path: str
    value: Any
    items: tuple[tuple[Any, Any], ...]

    def path_of(self, key: Any) -> str:
        """Where one of the items is."""
        if isinstance(self.value, (MutableMapping, *_CONTAINERS)):
            return f"{self.path}[{key!r}]"
        return f"{self.path}.{key}" if self.path else str(key)


def containers_in(optimizer: Optimizer) -> Iterator[Container]:
    """All containers and objects that an optimizer reaches, each once, the nearest first.

    The state of single parameters, which is what a dictionary has under a parameter, is left out. Of a
    model only layers and their parameters are looked at.

    Args:
        optimizer: any.

    Yields:
        Containers and objects with what they contain.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> optimizer.history = {"losses": [1.0, 2.0]}
        >>> [container.path for container in containers_in(optimizer) if "history" in container.path]
        ['history', "history['losses']"]
    """
    waiting: deque[tuple[str, Any]] = deque([("", optimizer)])
    seen: dict[int, Any] = {}  # kept alive, so that no number is given twice
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        items = _items(value)
        if items is None:
            continue
        found = Container(path, value, items)
        yield found
        waiting.extend((found.path_of(key), item) for key, item in items if not _is_simple(item))


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor, *_OPAQUE))


def _items(value: Any) -> tuple[tuple[Any, Any], ...] | None:
    """What to look at in a container or object; ``None`` for what contains nothing."""
    if isinstance(value, MutableMapping):
        return tuple((key, item) for key, item in value.items() if not isinstance(key, Tensor))
    if isinstance(value, _CONTAINERS):
        return tuple(enumerate(value))
    if isinstance(value, nn.Module):
        return ("_parameters", value._parameters), ("_modules", value._modules)
    if type(value).__module__.partition(".")[0] in _OPAQUE_PACKAGES:
        return None
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    slots = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return tuple(slots) if slots else None
    return (*slots, *attributes.items())


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def optimizers_in(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it wraps.

    Args:
        optimizer: any.

    Returns:
        The optimizer first.
    """
    return [
        container.value for container in containers_in(optimizer) if isinstance(container.value, Optimizer)
    ]
