"""Which buffers of a model count or average, by the text of its code: half precision would spoil them.

A count in bfloat16 stops at 256, whose next number is 258, and an average in which a batch weighs 0.001 stops
far from its value. What is only overwritten (a queue of samples, a cached table) loses no more than any
activation does.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from lightning_memtrain.precision.weights.attribute_writes import (
    ALL_WEIGHTS,
    AttributePath,
    WrittenAttributes,
    attributes_written_by,
)

# float32 has all whole numbers up to here.
_LARGEST_WHOLE = 2.0**24


class BufferUsage:
    """Tells which buffers of a model are statistics.

    Args:
        model: whose classes are read; those of torch and Lightning are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_class: dict[type, WrittenAttributes] = {}
        self._parents: dict[int, set[str]] = defaultdict(set)  # names that a module goes by
        elsewhere: tuple[set[AttributePath], ...] = set(), set(), set()
        for module in model.modules():
            for name, child in module.named_children():
                self._parents[id(child)].add(name)
            kind = type(module)
            if kind not in self._by_class:
                own = self._by_class[kind] = attributes_written_by(kind.__mro__)
                for found, paths in zip(elsewhere, own, strict=True):
                    found |= {path for path in paths if path[0] is not None}
        self._elsewhere = elsewhere

    def accumulates(self, layer: nn.Module, name: str) -> bool:
        """Whether the model's code makes new values of a buffer of old ones.

        Args:
            layer: one of the model's.
            name: of the buffer.

        Returns:
            ``False`` also where there is no code to read.
        """
        return self._is_in(0, layer, name)

    def accumulates_strictly(self, layer: nn.Module, name: str) -> bool:
        """Whether that fails where inputs are in half precision and the buffer is not.

        Args:
            layer: one of the model's.
            name: of the buffer.

        Returns:
            ``True`` for ``lerp_``, ``index_add_`` and their like, and for functions that are not looked into.
        """
        return self._is_in(1, layer, name)

    def overwrites(self, layer: nn.Module, name: str) -> bool:
        """Whether the model's code replaces the values of a buffer.

        Args:
            layer: one of the model's.
            name: of the buffer.

        Returns:
            ``False`` also where there is no code to read.
        """
        return self._is_in(2, layer, name)

    def averages(self, module: nn.Module) -> bool:
        """Whether the model's code makes new weights of a module of old ones, as those of a mean teacher.

        Args:
            module: one of the model's.

        Returns:
            ``False`` also where there is no code to read.
        """
        return any((name, ALL_WEIGHTS) in self._elsewhere[0] for name in self._parents[id(module)])

    def _is_in(self, which: int, layer: nn.Module, name: str) -> bool:
        own = self._by_class.get(type(layer))
        names = {(parent, name) for parent in self._parents[id(layer)]} | {("", name)}
        return (own is not None and (None, name) in own[which]) or bool(names & self._elsewhere[which])


def holds_whole_numbers(buffer: Tensor, dtype: torch.dtype) -> bool:
    """Whether a buffer holds whole numbers, some of which a dtype does not have.

    Args:
        buffer: of any shape, of floating-point numbers.
        dtype: a half precision.

    Returns:
        ``True`` for positions and identities above 256 in bfloat16, and above 2048 in float16; ``False`` for
        masks, whose one large number need not be exact.
    """
    if buffer.is_meta or buffer.numel() == 0:
        return False
    values = buffer.detach().float()
    if not bool((values == values.round()).all()) or not bool((values.abs() < _LARGEST_WHOLE).all()):
        return False
    inexact = values[values.to(dtype).float() != values]
    return inexact.numel() > 0 and bool(inexact.min() != inexact.max())
