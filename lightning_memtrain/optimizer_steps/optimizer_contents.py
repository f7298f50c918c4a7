"""What an optimizer holds, in any nesting of containers, objects and other optimizers."""

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

from lightning_memtrain.compat.lightning_names import PACKAGES

# Code, and what leads out of the optimizer into the rest of the program.
_OPAQUE = (
    *(type, ModuleType, FunctionType, MethodType, BuiltinFunctionType),
    *(logging.Logger, torch.Generator, Dataset, DataLoader),
)
_OPAQUE_PACKAGES = {*PACKAGES, "threading"}
_CONTAINERS = (list, tuple, deque, set, frozenset)


class Holding(NamedTuple):
    """A container or object that an optimizer reaches.

    Args:
        place: where, as one would write it after ``optimizer.``; empty for the optimizer itself.
        holder: a dictionary, list, tuple, deque or set; an object stands for itself.
        items: what it holds, by key, place or name of the attribute.
    """

    place: str
    holder: Any
    items: tuple[tuple[Any, Any], ...]

    def place_of(self, key: Any) -> str:
        """Where one of the items is."""
        if isinstance(self.holder, (MutableMapping, *_CONTAINERS)):
            return f"{self.place}[{key!r}]"
        return f"{self.place}.{key}" if self.place else str(key)


def holdings(optimizer: Optimizer) -> Iterator[Holding]:
    """All that an optimizer reaches, each once, the nearest first.

    The state of single parameters, which is what a dictionary holds under a parameter, is left out. Of a
    model only layers and their parameters are looked at.

    Args:
        optimizer: any.

    Yields:
        Containers and objects with what they hold.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> optimizer.history = {"losses": [1.0, 2.0]}
        >>> [holding.place for holding in holdings(optimizer) if "history" in holding.place]
        ['history', "history['losses']"]
    """
    waiting: deque[tuple[str, Any]] = deque([("", optimizer)])
    seen: dict[int, Any] = {}  # kept alive, so that no number is given twice
    while waiting:
        place, holder = waiting.popleft()
        if id(holder) in seen:
            continue
        seen[id(holder)] = holder
        items = _items(holder)
        if items is None:
            continue
        found = Holding(place, holder, items)
        yield found
        waiting.extend((found.place_of(key), value) for key, value in items if not _is_simple(value))


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor, *_OPAQUE))


def _items(holder: Any) -> tuple[tuple[Any, Any], ...] | None:
    """What to look at in a holder; ``None`` for what holds nothing."""
    if isinstance(holder, MutableMapping):
        return tuple((key, value) for key, value in holder.items() if not isinstance(key, Tensor))
    if isinstance(holder, _CONTAINERS):
        return tuple(enumerate(holder))
    if isinstance(holder, nn.Module):
        return ("_parameters", holder._parameters), ("_modules", holder._modules)
    if type(holder).__module__.partition(".")[0] in _OPAQUE_PACKAGES:
        return None
    names = [name for kind in type(holder).__mro__ for name in _slots(kind)]
    slots = [(name, getattr(holder, name)) for name in names if hasattr(holder, name)]
    attributes = getattr(holder, "__dict__", None)
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
    return [holding.holder for holding in holdings(optimizer) if isinstance(holding.holder, Optimizer)]
