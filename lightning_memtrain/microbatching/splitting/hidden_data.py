"""Items of a batch that hide data of its samples, so that they cannot be passed whole to every chunk."""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# What may hold no tensor, and is not worth a look.
_CLOSED = (str, bytes, bool, int, float, complex, type(None), type, types.ModuleType, types.FunctionType)
# What other libraries read the data of an object by: NumPy, arrow and DLPack; images and tables have them.
_ARRAY_PROTOCOLS = ("__array__", "__array_interface__", "__dataframe__", "__arrow_c_stream__", "__dlpack__")


def array_types() -> tuple[type[Any], ...]:
    """What is sliced along its first axis."""
    # NumPy is no dependency: where nothing has imported it, nothing is an array of it.
    numpy = sys.modules.get("numpy")
    return (Tensor,) if numpy is None else (Tensor, numpy.ndarray)


def sliced_shape(item: Any) -> tuple[int, ...]:
    """Sizes of the axes by which an item can be sliced.

    Args:
        item: of a batch.

    Returns:
        Those of a tensor or an array; those that all tensors of a ``TensorDict`` share; none for all others.
    """
    if isinstance(item, array_types()):
        return tuple(item.shape)
    return tuple(item.batch_size) if is_tensordict(item) else ()


def is_tensordict(item: Any) -> bool:
    """Whether an item slices all its tensors by itself.

    Args:
        item: of a batch.

    Returns:
        ``True`` for tensordict's ``TensorDict`` and ``tensorclass``, and what is like them.
    """
    return isinstance(getattr(item, "batch_size", None), torch.Size) and hasattr(type(item), "__getitem__")


def obstacle(item: Any) -> str:
    """What keeps an item that is no container from being sliced, or else passed whole to every chunk.

    Args:
        item: of a batch.

    Returns:
        A description of it for an error; empty if nothing does.

    Example:
        >>> class Graphs:
        ...     def __init__(self, nodes): self.nodes = nodes
        >>> obstacle(Graphs(torch.zeros(3)))
        'an object of class Graphs, which hides data (in `.nodes`)'
        >>> obstacle("train")
        ''
    """
    if isinstance(item, PackedSequence):
        return "a PackedSequence, whose first axis runs over time steps and samples together"
    if isinstance(item, Tensor) and item.is_nested:
        return "a nested tensor, whose samples differ in shape"
    if isinstance(item, Tensor) and item.layout != torch.strided:
        return f"a tensor of layout {item.layout}"
    if isinstance(item, (*array_types(), *_CLOSED)) or _is_numpy_number(item) or sliced_shape(item):
        return ""
    name = type(item).__name__
    if isinstance(item, Iterator):
        return f"an object of class {name}, an iterator, which the first chunk uses up"
    if _moves(item):
        return f"an object of class {name}, whose method `to` shows that it holds data, as batches of graphs"
    if any(hasattr(type(item), protocol) for protocol in _ARRAY_PROTOCOLS):
        return f"an object of class {name}, which can be read as an array"
    path = _path_to_data(item)
    return "" if path is None else f"an object of class {name}, which hides data (in `{path}`)"


def is_column(item: Any) -> bool:
    """Whether an item is a row of labels or numbers of another library, such as a `pandas.Index`.

    Args:
        item: of a batch.

    Returns:
        Whether it has one axis and a length, and is neither a tensor nor an array that can be sliced.
    """
    return (
        not isinstance(item, array_types())
        and not sliced_shape(item)
        and not _moves(item)
        and hasattr(type(item), "__array__")
        and hasattr(type(item), "__len__")
        and getattr(item, "ndim", None) == 1
    )


def holds_data(item: Any) -> bool:
    """Look for data anywhere in an item.

    Args:
        item: anything.

    Returns:
        Whether there is a tensor, an array or what can be moved to a device.
    """
    return isinstance(item, array_types()) or _path_to_data(item) is not None


def attributes(item: Any) -> dict[str, Any]:
    """What an object has in its dictionary and its slots.

    Args:
        item: anything.

    Returns:
        Values by name.
    """
    slots = [name for kind in type(item).__mro__ for name in _slots(kind)]
    found = {name: getattr(item, name) for name in slots if hasattr(item, name)}
    return found | dict(getattr(item, "__dict__", {}))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{kind.__name__.lstrip('_')}"  # how a class writes its names with two underscores
    names = tuple(private + name if name.startswith("__") and name[-2:] != "__" else name for name in names)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _moves(item: Any) -> bool:
    return callable(getattr(type(item), "to", None))


def _path_to_data(item: Any) -> str | None:
    """Where in an object there is a tensor, an array or a batch of graphs, looking at nearer places first."""
    waiting, seen = deque([("", item)]), {id(item)}
    while waiting:
        path, found = waiting.popleft()
        for step, child in _inside(found):
            if isinstance(child, array_types()) or _moves(child):
                return path + step
            if id(child) not in seen and not isinstance(child, _CLOSED):
                seen.add(id(child))
                waiting.append((path + step, child))
    return None


def _inside(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in item.items())
    elif isinstance(item, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{number}]", value) for number, value in enumerate(item))
    yield from ((f".{name}", value) for name, value in attributes(item).items())


def _is_numpy_number(item: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(item, numpy.generic)
