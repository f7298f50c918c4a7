"""What becomes of a model's buffers when it is cast to half precision."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from lightning_memtrain.precision.weights.buffer_usage import BufferUsage, holds_whole_numbers
from lightning_memtrain.precision.weights.kept_layers import ids_inside

# A layer with at most so many parameters for each number of its statistics is kept in float32 as a whole.
_FEW = 4


class NamedBuffer(NamedTuple):
    """A buffer of a model.

    Args:
        layer: has it.
        name: of the buffer in its layer.
        full_name: of the buffer in the model.
    """

    layer: nn.Module
    name: str
    full_name: str


class ConvertedBuffers(NamedTuple):
    """What became of a model's buffers, other than those of layers that are kept as a whole.

    Args:
        kept: they stay in float32, among others in half precision; those of a single number are left out.
        unclear: they were cast, and may change in training, for all that the code of the model says.
    """

    kept: list[NamedBuffer]
    unclear: list[NamedBuffer]


class BufferPlan:
    """Decides for a model's buffers of more than one floating-point number whether they are cast.

    Args:
        module: the model.
        dtype: the half precision.
        leave_out: identities of layers that are not looked at.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, leave_out: set[int]) -> None:
        self.kept_layers: list[nn.Module] = []
        """Layers that are kept in float32 as a whole."""
        self.in_fp32: dict[nn.Module, set[str]] = {}
        """Those that stay in float32 by themselves, by their layer."""
        self.unclear: dict[nn.Module, set[str]] = {}
        """Those that are cast though they, or for all that the code of the model says, change in training."""
        found = [
            (layer, name, buffer)
            for layer in module.modules()
            for name, buffer in layer._buffers.items()
            if buffer is not None and buffer.is_floating_point() and buffer.dim() > 0
            if id(layer) not in leave_out
        ]
        self.averaged: list[nn.Module] = []
        """Modules whose weights training averages, other than by an optimizer."""
        if not found and all(p.requires_grad for p in module.parameters()):
            return
        usage = BufferUsage(module)
        self.averaged += [layer for layer in module.modules() if usage.averages(layer)]
        statistics: dict[nn.Module, int] = Counter()
        for layer, name, buffer in found:
            if usage.accumulates(layer, name):
                statistics[layer] += buffer.numel()
        for layer, num_statistics in statistics.items():
            if layer is not module and sum(p.numel() for p in layer.parameters()) <= _FEW * num_statistics:
                self.kept_layers.append(layer)
        inside = ids_inside(self.kept_layers)
        for layer, name, buffer in found:
            if id(layer) in inside:
                continue
            stays = usage.accumulates(layer, name) and not usage.accumulates_strictly(layer, name)
            if stays or holds_whole_numbers(buffer, dtype):
                self.in_fp32.setdefault(layer, set()).add(name)
            elif not usage.overwrites(layer, name):
                self.unclear.setdefault(layer, set()).add(name)
