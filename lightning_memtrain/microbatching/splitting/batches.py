"""Split the batch of a training step into chunks along the first axis, whatever its structure."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.microbatching.splitting.hidden_data import (
    array_types,
    holds_data,
    is_column,
    is_tensordict,
    obstacle,
    sliced_shape,
)

# Key of what a container holds, step of the path to it, and it itself.
_Child: TypeAlias = tuple[Any, str, Any]

# What takes the place of a leaf, given the leaf and its path in the batch.
LeafFunction: TypeAlias = Callable[[Any, str], Any]

_CURE = (
    "Pass `split_fn`, a function from (batch, number of chunks) to a list of chunks, "
    "to say how such a batch is split."
)


def batch_size_of(batch: Any) -> int:
    """Count the samples of a batch: the length of the first axis that all its tensors and arrays share.

    Args:
        batch: tensors and NumPy arrays in tuples, lists, mappings, named tuples and dataclasses, nested in
            any way. What has no axis does not count. Other objects must not hold data of samples.

    Returns:
        Number of samples, at least 0.

    Raises:
        MisconfigurationException: if nothing in ``batch`` has an axis, if the first axes differ, or if an
            item cannot be sliced by its first axis, such as a batch of graphs. The message names the items by
            their path.

    Example:
        >>> batch_size_of({"images": torch.zeros(8, 3, 32, 32), "labels": torch.zeros(8), "epoch": 3})
        8
    """
    shapes: dict[str, tuple[int, ...]] = {}
    lists: dict[str, Any] = {}
    columns: dict[str, Any] = {}

    def note_shape(leaf: Any, path: str) -> Any:
        if _is_list(leaf):
            lists[path] = leaf  # of graphs or images, say: one per sample or not, which shapes will tell
        elif is_column(leaf):
            columns[path] = leaf  # names of features, say; one label per sample must not be passed whole
        else:
            _refuse_obstacle(leaf, path)
        if shape := sliced_shape(leaf):
            shapes[path] = shape
        return leaf

    _map_leaves(batch, "batch", note_shape)
    if not shapes:
        raise MisconfigurationException(
            "The batch must hold a tensor with at least one axis, to be split along the first, "
            f"but got a batch of type `{type(batch).__name__}` in which there is none to be seen.\n{_CURE}"
        )
    if len({shape[0] for shape in shapes.values()}) > 1:
        listed = "".join(f"\n  {path}: {shape}" for path, shape in shapes.items())
        raise MisconfigurationException(
            "All tensors of the batch must have the same length along their first axis, the samples, "
            f"but got{listed}\n{_CURE}"
        )
    num_samples = next(iter(shapes.values()))[0]
    for path, column in columns.items():
        if len(column) == num_samples:
            _refuse_obstacle(column, path)
    for path, items in lists.items():
        if len(items) != num_samples:
            for number, item in enumerate(items):
                _refuse_obstacle(item, f"{path}[{number}]")
    return num_samples


def _refuse_obstacle(leaf: Any, path: str) -> None:
    if described := obstacle(leaf):
        raise MisconfigurationException(
            "Every item of the batch must allow to be sliced by its first axis, the samples, "
            f"but got {path}, {described}.\n{_CURE}"
        )


def split_batch(batch: Any, num_microbatches: int) -> list[Any]:
    """Split a batch, in order, into chunks whose sizes differ by at most one, larger ones first.

    Every chunk has the type and structure of the batch. Tensors and NumPy arrays are sliced without a copy.
    A list or tuple of plain items (strings, numbers, ``None``...) is sliced, too, if it has one item per
    sample. Everything else is the same object in every chunk.

    Args:
        batch: see :func:`batch_size_of`.
        num_microbatches: number of chunks, at least 1; there are fewer if the batch has fewer samples.

    Returns:
        The chunks, none of them empty. A batch that is not divided, because one chunk is asked for or it has
        less than two samples, is itself the only chunk.

    Raises:
        ArgumentError: if ``num_microbatches`` is below 1.
        ArgumentError: see :func:`batch_size_of`.

    Example:
        >>> split_batch((torch.arange(5), ["a", "b", "c", "d", "e"], 0.1), num_microbatches=2)
        [(tensor([0, 1, 2]), ['a', 'b', 'c'], 0.1), (tensor([3, 4]), ['d', 'e'], 0.1)]
    """
    if num_microbatches < 1:
        raise ArgumentError(
            "`split_batch(num_microbatches)` must be at least 1, but got "
            f"num_microbatches={num_microbatches!r}. Use 1 or more; what there is to save grows with the "
            "number of chunks."
        )
    if num_microbatches == 1:  # the identity, also for a batch that could not be divided
        return [batch]
    num_samples = batch_size_of(batch)
    num_chunks = min(num_microbatches, num_samples)
    if num_chunks <= 1:
        return [batch]
    size, num_larger = divmod(num_samples, num_chunks)
    starts = [chunk * size + min(chunk, num_larger) for chunk in range(num_chunks + 1)]
    return [
        _map_leaves(batch, "batch", _slicer(num_samples, slice(start, stop)))
        for start, stop in pairwise(starts)
    ]


def take_samples(batch: Any, num_samples: int) -> Any:
    """A batch of another size: samples in order, and from the first one again after the last.

    Args:
        batch: see :func:`batch_size_of`; at least one sample.
        num_samples: how many, at least 1.

    Returns:
        A batch of the same type and structure; tensors and arrays in it are copies.

    Raises:
        ArgumentError: if ``num_samples`` is below 1.
        ArgumentError: see :func:`batch_size_of`.

    Example:
        >>> take_samples((torch.arange(3), ["a", "b", "c"]), 5)
        (tensor([0, 1, 2, 0, 1]), ['a', 'b', 'c', 'a', 'b'])
    """
    if num_samples < 1:
        raise ArgumentError(
            f"`take_samples(num_samples)` must be at least 1, but got {num_samples}. Ask for one."
        )
    size = batch_size_of(batch)
    places = [place % size for place in range(num_samples)]

    def take(leaf: Any, path: str) -> Any:
        if sliced_shape(leaf):
            return leaf[places]
        if not _is_list(leaf) or len(leaf) != size:
            return leaf
        return type(leaf)(leaf[place] for place in places)

    return _map_leaves(batch, "batch", take)


def _slicer(num_samples: int, samples: slice) -> LeafFunction:
    def slice_leaf(leaf: Any, path: str) -> Any:
        if sliced_shape(leaf):
            return leaf[samples]
        # `default_collate` turns the strings of samples into a list or tuple of strings, and other collate
        # functions keep ids, paths or weights this way: as many plain items as samples are one per sample.
        # A subclass of tuple is a record, such as torch.Size, whatever its length.
        if not _is_list(leaf) or len(leaf) != num_samples:
            return leaf
        if isinstance(leaf, list):
            clone = copy.copy(leaf)  # keeps the attributes of a subclass
            clone[:] = leaf[samples]
            return clone
        return leaf[samples]

    return slice_leaf


def _is_list(leaf: Any) -> bool:
    return type(leaf) is tuple or isinstance(leaf, list)


def _map_leaves(item: Any, path: str, function: LeafFunction) -> Any:
    """Put ``function(leaf, path)`` in the place of every leaf, in copies of the containers around it.

    A container in which no leaf is replaced is not copied.
    """
    children = _children(item)
    mapped = _with_items(item, _replaced(children, path, function)) if children else function(item, path)
    # Hugging Face's BatchEncoding keeps one record per sample beside its data.
    if mapped is not item and isinstance(item, UserDict) and (records := vars(item).get("_encodings")):
        mapped._encodings = function(records, f"{path}.encodings")
    if isinstance(item, (Mapping, list, tuple)) or _is_dataclass(item):
        attributes = _replaced(_further_attributes(item, children), path, function)
        return _with_attributes(item, mapped, attributes)
    return mapped


def _replaced(children: list[_Child], path: str, function: LeafFunction) -> dict[Any, Any]:
    mapped = {key: _map_leaves(child, path + step, function) for key, step, child in children}
    return {key: mapped[key] for key, _, child in children if mapped[key] is not child}


def _children(item: Any) -> list[_Child]:
    """What a container holds; none for a leaf."""
    if _is_data(item):
        return []
    if isinstance(item, Mapping):
        return [(key, f"[{key!r}]", value) for key, value in item.items()]
    if _is_dataclass(item):
        names = [field.name for field in dataclasses.fields(item) if hasattr(item, field.name)]
        return [(name, f".{name}", getattr(item, name)) for name in names]
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return [(i, f".{name}", item[i]) for i, name in enumerate(item._fields)]
    if isinstance(item, (list, tuple)) and not all(map(_is_plain, set(map(type, item)))):
        return [(i, f"[{i}]", value) for i, value in enumerate(item)]
    return []


def _further_attributes(item: Any, children: list[_Child]) -> list[_Child]:
    """Data that a container of a class of its own has beside its items, e.g. set in ``__post_init__``."""
    if not hasattr(item, "__dict__") or _is_data(item):
        return []
    known = {id(value) for _, _, value in children}
    return [
        (name, f".{name}", value)
        for name, value in vars(item).items()
        if id(value) not in known
        and not (isinstance(item, UserDict) and name in ("data", "_encodings"))
        and not _is_cached(item, name)
        and holds_data(value)
    ]


def _with_items(item: Any, replaced: dict[Any, Any]) -> Any:
    """Copy a container, with other values for some of its keys."""
    if not replaced:
        return item
    if isinstance(item, tuple):
        values = [replaced.get(i, value) for i, value in enumerate(item)]
        try:
            # Not by the constructor, which may take them one by one, or others.
            record: Any = tuple.__new__(type(item), values)
        except TypeError:
            return type(item)(values)  # of C, such as torch.return_types.max
        if hasattr(item, "__dict__"):
            vars(record).update(vars(item))
        return record
    if isinstance(item, Mapping) and not isinstance(item, MutableMapping):
        return type(item)({**item, **replaced})  # type: ignore[call-arg]
    # A copy keeps what no constructor is known for: default factories, attributes, init=False fields.
    clone = copy.copy(item)
    if isinstance(item, (Mapping, list)):
        for key, value in replaced.items():
            clone[key] = value
        return clone
    return _with_attributes(item, clone, replaced)


def _with_attributes(item: Any, mapped: Any, replaced: dict[str, Any]) -> Any:
    """Set attributes of what takes the place of a container; of a copy, if it is the container itself."""
    clone = copy.copy(item) if replaced and mapped is item else mapped
    if clone is item:
        return item
    for name, value in replaced.items():
        object.__setattr__(clone, name, value)  # also if it is frozen
    for name in [name for name in getattr(clone, "__dict__", ()) if _is_cached(clone, name)]:
        del clone.__dict__[name]  # computed from the whole batch
    return clone


def _is_data(item: Any) -> bool:
    """Whether an item is data itself, also if it is a container by its class."""
    return isinstance(item, (*array_types(), torch.nn.utils.rnn.PackedSequence)) or is_tensordict(item)


def _is_cached(item: Any, name: str) -> bool:
    return isinstance(getattr(type(item), name, None), cached_property)


def _is_dataclass(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)


def _is_plain(kind: type) -> bool:
    # Asked of types, since a list of strings is as long as the batch.
    is_container = issubclass(kind, (Mapping, list, tuple)) or dataclasses.is_dataclass(kind)
    return not is_container and not issubclass(kind, array_types())
