"""Tensors as rows of memory, so that they can be read and written piece by piece whatever their strides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class MemoryOrder(NamedTuple):
    """Which elements of a storage a tensor covers, in the order of memory and each of them once.

    A tensor without gaps is one row, whatever the order of its axes; two tensors of equal memory order on one
    storage hold the same numbers.

    Args:
        offset: first element in its storage.
        sizes: as few axes as possible, the one with the largest stride first.
        strides: of the axes, in elements.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in all."""
        return math.prod(self.sizes)

    def view(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of this order, of any dtype, in as few axes as possible."""
        return tensor.as_strided(self.sizes, self.strides, self.offset)


def memory_order(tensor: Tensor) -> MemoryOrder | None:
    """The memory order of a strided tensor; ``None`` if elements overlap other than by expansion.

    Args:
        tensor: any strided tensor that has elements.

    Returns:
        Its elements without those that an expanded axis repeats.

    Example:
        >>> memory_order(torch.zeros(2, 3, 4).transpose(0, 2))
        MemoryOrder(offset=0, sizes=(24,), strides=(1,))
        >>> memory_order(torch.zeros(2, 3, 4)[:, :, 1:].expand(5, 2, 3, 3))
        MemoryOrder(offset=1, sizes=(6, 3), strides=(4, 1))
    """
    axes = sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride
    )
    last = 0  # the farthest element so far; the next axis has to step beyond it
    for stride, size in axes:
        if stride <= last:
            return None
        last += stride * (size - 1)
    merged: list[tuple[int, int]] = []
    for stride, size in reversed(axes):
        if merged and stride * size == merged[-1][0]:
            merged[-1] = (stride, size * merged[-1][1])
        else:
            merged.append((stride, size))
    if not merged or merged[-1][0] != 1:
        merged.append((1, 1))
    return MemoryOrder(
        int(tensor.storage_offset()), tuple(size for _, size in merged), tuple(stride for stride, _ in merged)
    )


def empty_like_layout(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A new tensor of this shape and these strides; expanded axes repeat their elements in it, too."""
    once = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
    return torch.empty_strided(once, strides, dtype=dtype, device=device).as_strided(shape, strides)


def row_pieces(sizes: tuple[int, ...], group_size: int, most: int) -> Iterator[tuple[int, int]]:
    """Split the first axis so that pieces are whole groups of elements, but for the last.

    Args:
        sizes: of a :class:`MemoryOrder`.
        group_size: elements per group.
        most: elements per piece, unless a single step of whole groups has more.

    Yields:
        First and last (exclusive) index along the first axis.
    """
    per_row = math.prod(sizes[1:])
    rows_per_step = group_size // math.gcd(group_size, per_row)
    step = rows_per_step * max(1, most // (rows_per_step * per_row))
    for start in range(0, sizes[0], step):
        yield start, min(start + step, sizes[0])
