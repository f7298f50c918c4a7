"""What a tensor was computed from, by its graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_memtrain.precision.half_dtypes import HALF_DTYPES

# Nodes of a graph that are looked at.
_MOST_NODES = 256


def was_half(tensor: Tensor) -> bool:
    """Whether a tensor was computed in half precision at first, and cast then.

    Args:
        tensor: of any shape and floating-point dtype.

    Returns:
        ``False`` also for tensors without a graph.
    """
    for node in _nodes_before(tensor):
        variable = _parameter_of(node)
        if variable is not None and variable.dtype in HALF_DTYPES:
            return True
        if _casts(node) and any(_parameter_of(inner) is None for inner, _ in node.next_functions):
            return True
    return False


def parameters_before(tensor: Tensor) -> Iterator[Tensor]:
    """Parameters that a tensor was computed with since it was last cast, the nearest first.

    Args:
        tensor: of any shape and floating-point dtype.

    Yields:
        Tensors that accumulate gradients.
    """
    for node in _nodes_before(tensor, through_casts=False):
        variable = _parameter_of(node)
        if variable is not None:
            yield variable


def _nodes_before(tensor: Tensor, through_casts: bool = True) -> Iterator[Any]:
    waiting = deque([tensor.grad_fn])
    for _ in range(_MOST_NODES):
        node: Any = waiting.popleft() if waiting else None
        if node is None:
            return
        yield node
        if through_casts or not _casts(node):
            waiting.extend(inner for inner, _ in node.next_functions if inner is not None)


def _casts(node: Any) -> bool:
    return str(node.name()).startswith("ToCopyBackward")


def _parameter_of(node: Any) -> Tensor | None:
    """Of a node that accumulates into ``.grad``."""
    found: Tensor | None = getattr(node, "variable", None)
    return found
