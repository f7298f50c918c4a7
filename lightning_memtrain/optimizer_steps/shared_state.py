"""What an optimizer keeps across parameters, which steps in parts would change once per part."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import version_counter
from lightning_memtrain.optimizer_steps.optimizer_contents import containers_in, optimizers_in

# Larger tensors are told to have changed by their version, and cannot be put back.
_SMALL_NUMEL = 1024
# Their classes treat each parameter by itself, and may set flags at their first step.
_KNOWN = ("torch.optim.", "torchao.optim.", "bitsandbytes.optim.")


class SharedState:
    """What an optimizer keeps besides the state of its parameters, at one moment.

    Counters, flags, texts, rates and tensors are seen in dictionaries, lists, sets and objects, those of
    optimizers inside of it among them. Classes of torch, torchao and bitsandbytes are known to have none.

    Args:
        optimizer: any.

    Example:
        >>> class Counting(torch.optim.SGD):
        ...     pass
        >>> optimizer = Counting([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> optimizer.history = {"steps": 0}
        >>> before = SharedState(optimizer)
        >>> optimizer.history["steps"] += 1
        >>> before.changed()
        ["history['steps']"]
        >>> before.restore(), optimizer.history
        (True, {'steps': 0})
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.known = type(optimizer).__module__.startswith(_KNOWN)
        """Whether it is one of a library's that keeps nothing across parameters, and is not searched."""
        self._found: dict[str, Any] = {}
        self._copies: list[tuple[Any, tuple[tuple[Any, Any], ...]]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        if self.known:
            return
        self._found = _found_in(optimizer)
        self._copies = [(container.value, container.items) for container in containers_in(optimizer)]
        parameters = _parameters_of(optimizer)
        self._tensors = [
            (value, value.detach().clone())
            for _, items in self._copies
            for _, value in items
            if isinstance(value, Tensor) and id(value) not in parameters and _is_small(value)
        ]

    def changed(self) -> list[str]:
        """Where the optimizer has changed since.

        Returns:
            The places, sorted.
        """
        if self.known:
            return []
        now = _found_in(self.optimizer)
        places = now.keys() | self._found.keys()
        return sorted(
            place for place in places if not _same(self._found.get(place, _NONE), now.get(place, _NONE))
        )

    @torch.no_grad()
    def restore(self) -> bool:
        """Put back what has changed.

        Returns:
            Whether all is as it was: large tensors, and objects that do not show what they hold, stay.
        """
        for container, items in self._copies:
            _put_back(container, items)
        for tensor, copy in self._tensors:
            if not torch.equal(tensor, copy):
                tensor.copy_(copy)
        return not self.changed()


_NONE = object()


def _found_in(optimizer: Optimizer) -> dict[str, Any]:
    """Each value that can be compared, by its place."""
    parameters = _parameters_of(optimizer)
    return {
        container.path_of(key): _comparable(value)
        for container in containers_in(optimizer)
        for key, value in _in_stable_order(container.value, container.items)
        if id(value) not in parameters and not isinstance(value, nn.Parameter)
    }


def _parameters_of(optimizer: Optimizer) -> set[int]:
    """Numbers of what is stepped, which need not be an ``nn.Parameter``."""
    return {
        id(parameter)
        for inner in optimizers_in(optimizer)
        for group in inner.param_groups
        for parameter in group["params"]
    }


def _in_stable_order(container: Any, items: tuple[tuple[Any, Any], ...]) -> tuple[tuple[Any, Any], ...]:
    if isinstance(container, (set, frozenset)):
        return tuple(enumerate(sorted((value for _, value in items), key=repr)))
    return items


def _comparable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, Tensor):
        # Not `id`: restoring gives the same numbers, not always the same object.
        if _is_small(value):
            return str(value.dtype), tuple(value.shape), str(value.detach().reshape(-1).tolist())
        return id(value), version_counter(value)
    if hasattr(value, "tobytes") and hasattr(value, "shape"):  # an array of NumPy's
        return value.shape, value.tobytes()
    if isinstance(value, (MutableMapping, list, tuple, deque, set, frozenset)) or hasattr(value, "__dict__"):
        return type(value)  # what it holds is compared by itself
    return type(value), repr(value)


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _SMALL_NUMEL and tensor.layout is torch.strided and not tensor.is_meta


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return type(one) is type(other) and bool(one == other)


def _put_back(container: Any, items: tuple[tuple[Any, Any], ...]) -> None:
    values = [value for _, value in items]
    if isinstance(container, MutableMapping):
        kept = dict(items)
        for key in [key for key in container if not isinstance(key, Tensor) and key not in kept]:
            del container[key]
        container.update(kept)
    elif isinstance(container, list):
        container[:] = values
    elif isinstance(container, (deque, set)):
        container.clear()
        container.extend(values) if isinstance(container, deque) else container.update(values)
    elif not isinstance(container, (tuple, frozenset, nn.Module)):
        names = dict(items)
        for name in [name for name in getattr(container, "__dict__", ()) if name not in names]:
            delattr(container, name)
        for name, value in items:
            if getattr(container, name, _NONE) is not value:
                object.__setattr__(container, name, value)
