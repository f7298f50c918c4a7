"""The same call of an operator with fewer samples, tokens or classes: one size replaced everywhere."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch

from lightning_memtrain.ledger.operators.workspace import Items, OpCall, TensorSpec

# Kernels treat whole vectors and the rest of a size in different ways.
_MOST_UNIT = 64
# OneDNN takes sizes on trust, gates times hidden size among them: with one replaced it writes elsewhere.
_UNCHECKED = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward")
    if hasattr(torch.ops.aten, name)
)


def sizes_of(call: OpCall) -> list[int]:
    """Sizes of a call's arguments, the one first that most bytes depend on.

    Args:
        call: any.

    Returns:
        Each size above 1 once.
    """
    num_bytes: dict[int, int] = {}
    for spec in call.tensors:
        for size in {*spec.shape}:
            if size > 1:
                num_bytes[size] = num_bytes.get(size, 0) + spec.num_bytes
    return sorted(num_bytes, key=lambda size: (-num_bytes[size], -size))


def smaller_sizes(size: int) -> Iterator[int]:
    """Sizes to try in the place of another one, such that three times as much is still less.

    Args:
        size: at least 2.

    Yields:
        Sizes with the same factors of two, up to 64, from the largest on.
    """
    unit = min(size & -size, _MOST_UNIT)
    smaller = size // 4 // unit
    while smaller:
        yield smaller * unit
        smaller //= 2


def with_size(call: OpCall, size: int, other: int) -> OpCall | None:
    """A call with another size in the place of one.

    Args:
        call: any.
        size: which; all that are equal to it are replaced, those in lists of sizes as well.
        other: what to put there.

    Returns:
        The call; ``None`` if a tensor of it has gaps, or shares memory as another size would not, or if the
        operator does not check that sizes go together.
    """
    if getattr(call.func, "overloadpacket", None) in _UNCHECKED:
        return None
    try:
        arguments = tuple(_replaced(one, size, other) for one in call.arguments)
        keywords = tuple((name, _replaced(one, size, other)) for name, one in call.keywords)
    except _NotDenseError:
        return None
    return OpCall(call.func, arguments, keywords)


class _NotDenseError(Exception):
    """A tensor's places are not in a row."""


def _replaced(value: Hashable, size: int, other: int) -> Hashable:
    if isinstance(value, TensorSpec):
        return _resized(value, size, other)
    if isinstance(value, Items):
        return replace(value, items=tuple(_replaced(one, size, other) for one in value.items))
    return other if type(value) is int and value == size else value


def _resized(spec: TensorSpec, size: int, other: int) -> TensorSpec:
    if size not in spec.shape:
        return spec
    shape = tuple(other if one == size else one for one in spec.shape)
    stride = [0] * len(shape)
    place, expected = 1, 1
    for axis in sorted(range(len(shape)), key=lambda axis: (spec.stride[axis], spec.shape[axis])):
        if spec.stride[axis] == 0 or spec.shape[axis] == 1:  # expanded, or of no matter
            stride[axis] = 0 if spec.stride[axis] == 0 else place
            continue
        if spec.stride[axis] != expected:
            raise _NotDenseError
        stride[axis] = place
        place *= shape[axis]
        expected *= spec.shape[axis]
    return TensorSpec(shape, tuple(stride), spec.dtype)
