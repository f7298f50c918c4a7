"""All tensors within reach of an object that a user made: a batch, an output, an entry of optimizer state."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

# What cannot hold a tensor, and of what there may be millions.
_ATOMS = (bool, int, float, complex, str, bytes, bytearray, type(None), torch.dtype, torch.device, torch.Size)
# An object that refers to one of these uses it and does not consist of it.
_NO_PARTS = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    torch.nn.Module,
    Optimizer,
    DataLoader,
    Dataset,
    Sampler,
    Iterator,
)
_COLLECTIONS = (list, tuple, set, frozenset, deque)


def find_tensors(thing: Any) -> list[torch.Tensor]:
    """All tensors that an object holds, whatever its class; slower than :func:`.storages.tensors_in`.

    Items of collections and mappings are followed, and what is stored in attributes, ``__slots__`` among
    them. No property is asked, since that may compute or raise. Modules, optimizers, datasets, loaders,
    iterators, functions and classes are not followed.

    Args:
        thing: a batch or anything else that a user made; it may be nested and refer to itself.

    Returns:
        Each tensor once, in the order in which they were found.

    Example:
        >>> class Graph:
        ...     def __init__(self, x):
        ...         self.nodes, self.whole = {"x": x}, self
        >>> [tensor.shape for tensor in find_tensors([Graph(torch.ones(2)), Graph(torch.ones(3))])]
        [torch.Size([2]), torch.Size([3])]
    """
    found: list[torch.Tensor] = []
    seen: dict[int, Any] = {}  # holds what was made on the way, so that no other object gets its address
    waiting = [thing]
    while waiting:
        item = waiting.pop()
        if type(item) in _ATOMS or id(item) in seen:
            continue
        seen[id(item)] = item
        with suppress(Exception):  # what raises when it is looked at, as a dead proxy does, shows nothing
            if isinstance(item, torch.Tensor):
                found.append(item)
            elif not isinstance(item, _NO_PARTS):
                waiting += reversed(_parts(item))
    return found


def _parts(item: Any) -> list[Any]:
    """What an object holds, one level deep."""
    parts: list[Any] = []
    with suppress(Exception):  # a mapping that loads its values may fail, and has attributes all the same
        parts += [part for part in _items(item) if type(part) not in _ATOMS]
    if type(item) in (list, tuple, dict, set):
        return parts
    for kind in type(item).__mro__:
        for value in vars(kind).values():
            if isinstance(value, types.MemberDescriptorType):  # a slot, under whatever name
                with suppress(AttributeError):  # not set
                    parts.append(value.__get__(item))
            elif isinstance(value, torch.Tensor):  # the default of a field
                parts.append(value)
    with suppress(AttributeError):
        attributes = object.__getattribute__(item, "__dict__")
        parts += [part for part in [*attributes.values()] if type(part) not in _ATOMS]
    return parts


def _items(item: Any) -> list[Any]:
    """Items of a collection, values of a mapping or of its look-alikes; of others, nothing."""
    if isinstance(item, _COLLECTIONS):
        return [*item]
    # Asked of the class: a data frame has no method `values` but an attribute that is computed.
    methods = (getattr(type(item), name, None) for name in ("keys", "values"))
    if isinstance(item, Mapping) or all(callable(method) for method in methods):
        return [*item.values()]
    if type(item).__module__ == "numpy" and item.dtype.hasobject:
        return [*item.flat]
    return []
