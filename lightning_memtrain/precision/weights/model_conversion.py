"""Models in half precision, in place, with layers and buffers that are kept in float32."""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics import Metric

from lightning_memtrain.compat.lightning_names import in_both
from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.precision.half_dtypes import HALF_DTYPES
from lightning_memtrain.precision.precision_settings import written_names
from lightning_memtrain.precision.weights.buffer_usage import BufferUse, holds_whole_numbers
from lightning_memtrain.precision.weights.layer_forwards import (
    BATCH_NORMS,
    LAYER_NORMS,
    Forward,
    answers_as_asked,
    forward_of_kept,
    replace_forwards,
)

NORM = "norm"
# A layer with at most so many parameters for each number of its statistics is kept in float32 as a whole.
_FEW = 4


class BufferPlace(NamedTuple):
    """Where a buffer is.

    Args:
        layer: has it.
        name: of the buffer in its layer.
        place: name of the buffer in the model.
    """

    layer: nn.Module
    name: str
    place: str


class ConvertedBuffers(NamedTuple):
    """What became of a model's buffers, other than those of layers that are kept as a whole.

    Args:
        kept: they stay in float32, among others in half precision; those of a single number are left out.
        unclear: they were cast, and may change in training, for all that the code of the model says.
    """

    kept: list[BufferPlace]
    unclear: list[BufferPlace]


def convert_module_(
    module: nn.Module, dtype: torch.dtype, keep_fp32: Sequence[str] = (NORM,)
) -> ConvertedBuffers:
    """Cast floating-point parameters and buffers in place, and keep those of some layers in float32.

    A kept layer works with half-precision inputs and answers in their dtype, or in half precision if it gets
    no floating-point number; so does a layer that shares a parameter with it. Batch and instance
    normalisation do so by themselves; layer, group and root-mean-square normalisation run with their weights
    cast on the fly, so that their activations stay in half precision; any other layer computes in float32.

    Whatever is named, some buffers stay in float32: those that count or average (see :class:`BufferUse`),
    those of a single number, and those of whole numbers that ``dtype`` does not have. A layer that has such
    buffers, and hardly more parameters, is kept as a whole. Another one answers in the dtype of its inputs;
    of its buffers those are cast, after all, that are written by operators which want all in one dtype.

    Metrics of torchmetrics and complex numbers are left alone. Once converted, a model can be converted
    again, which changes nothing.

    Args:
        module: the model.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        keep_fp32: ``"norm"`` for all normalisations, and names of layers, in which ``*`` stands for any text.

    Returns:
        What became of its buffers.

    Raises:
        MisconfigurationException: if a name is that of a TorchScript module, whose forward is what it is.

    Warns:
        NoEffectWarning: if a name matches no layer.
        UserWarning: if the code of the model averages weights that are cast, as those of a mean teacher.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> convert_module_(model, torch.bfloat16, keep_fp32=("norm", "2"))
        ConvertedBuffers(kept=[], unclear=[])
        >>> [layer.weight.dtype for layer in model]
        [torch.bfloat16, torch.float32, torch.float32]
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    named = _kept_layers(module, keep_fp32)
    metrics = _metrics(module)
    buffers = _Buffers(module, dtype, leave_out=_inside(named) | metrics)
    kept = _with_tied(module, [*named, *buffers.layers])
    inside = _inside(kept)
    in_fp32 = {id(p) for layer in kept for p in layer.parameters()}  # also if tied to one elsewhere
    converted = ConvertedBuffers([], [])
    for place, layer in module.named_modules():
        if id(layer) in metrics:
            continue
        for parameter in layer._parameters.values():
            if parameter is not None:
                _cast_(parameter, torch.float32 if id(parameter) in in_fp32 else dtype)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                found = BufferPlace(layer, name, f"{place}.{name}".lstrip("."))
                in_half = id(layer) not in inside and buffer.dim() > 0
                if in_half and name in buffers.in_fp32.get(layer, ()):
                    in_half = False
                    converted.kept.append(found)
                elif in_half and name in buffers.unclear.get(layer, ()):
                    converted.unclear.append(found)
                layer._buffers[name] = buffer.to(dtype if in_half else torch.float32)
        if isinstance(layer, in_both(_DeviceDtypeModuleMixin)):
            layer._dtype = dtype
    _warn_of_averages(module, [layer for layer in buffers.averaged if id(layer) not in inside], keep_fp32)
    forwards: dict[nn.Module, Forward | None] = {
        layer: answers_as_asked
        for layer in buffers.in_fp32
        if layer is not module and id(layer) not in inside
    }
    replace_forwards(module, forwards | {layer: forward_of_kept(layer, dtype) for layer in kept})
    return converted


def restore_module_(module: nn.Module) -> None:
    """Make a converted model one in float32 again that knows nothing of half precision.

    Its numbers stay what they are, and its parameters the same objects.

    Args:
        module: the model.
    """
    metrics = _metrics(module)
    for layer in module.modules():
        if id(layer) in metrics:
            continue
        for parameter in layer._parameters.values():
            if parameter is not None and parameter.dtype in HALF_DTYPES:
                _cast_(parameter, torch.float32)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.dtype in HALF_DTYPES:
                layer._buffers[name] = buffer.float()
        if isinstance(layer, in_both(_DeviceDtypeModuleMixin)):
            layer._dtype = torch.float32
    replace_forwards(module, {})


def _cast_(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if parameter.is_floating_point() and parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)
        if parameter.grad is not None:
            parameter.grad = None


class _Buffers:
    """What becomes of a model's buffers of more than one floating-point number.

    Args:
        module: the model.
        dtype: the half precision.
        leave_out: numbers of layers that are not looked at.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, leave_out: set[int]) -> None:
        self.layers: list[nn.Module] = []
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
        use = BufferUse(module)
        self.averaged += [layer for layer in module.modules() if use.averages(layer)]
        statistics: dict[nn.Module, int] = Counter()
        for layer, name, buffer in found:
            if use.accumulates(layer, name):
                statistics[layer] += buffer.numel()
        for layer, num_statistics in statistics.items():
            if layer is not module and sum(p.numel() for p in layer.parameters()) <= _FEW * num_statistics:
                self.layers.append(layer)
        inside = _inside(self.layers)
        for layer, name, buffer in found:
            if id(layer) in inside:
                continue
            stays = use.accumulates(layer, name) and not use.accumulates_strictly(layer, name)
            if stays or holds_whole_numbers(buffer, dtype):
                self.in_fp32.setdefault(layer, set()).add(name)
            elif not use.overwrites(layer, name):
                self.unclear.setdefault(layer, set()).add(name)


def _warn_of_averages(module: nn.Module, averaged: list[nn.Module], keep_fp32: Sequence[str]) -> None:
    names = {id(layer): name for name, layer in module.named_modules()}
    in_half = [
        names[id(layer)] for layer in averaged if any(p.dtype in HALF_DTYPES for p in layer.parameters())
    ]
    if in_half:
        warnings.warn(
            f"`LowPrecision` casts {', '.join(map(repr, in_half))} to half precision, where most of what the "
            "code of the model adds to these weights to average them is lost. Keep them in float32 by "
            f"`LowPrecision(keep_fp32={written_names((*keep_fp32, *in_half))})`, and cast what `lerp_` and "
            "its like get by `.float()`.",
            stacklevel=2,
        )


def _with_tied(module: nn.Module, kept: list[nn.Module]) -> list[nn.Module]:
    """Layers that are kept, and those without inner ones that share a parameter, as tied heads do."""
    kept = list(kept)
    while True:
        inside = _inside(kept)
        parameters = {id(p) for layer in kept for p in layer.parameters()}
        tied = [
            layer
            for layer in module.modules()
            if id(layer) not in inside
            and not any(layer.children())
            and any(id(p) in parameters for p in layer._parameters.values() if p is not None)
        ]
        if not tied:
            return kept
        kept += tied


def _metrics(module: nn.Module) -> set[int]:
    return _inside(layer for layer in module.modules() if isinstance(layer, Metric))


def _inside(layers: Iterable[nn.Module]) -> set[int]:
    """Numbers of layers and of all in them."""
    return {id(inner) for layer in layers for inner in layer.modules()}


def _kept_layers(module: nn.Module, keep_fp32: Sequence[str]) -> list[nn.Module]:
    """The outermost layers that are to be kept."""
    named = dict(module.named_modules())
    chosen: dict[str, nn.Module] = {}
    for pattern in keep_fp32:
        if pattern == NORM:
            chosen |= {name: layer for name, layer in named.items() if is_norm(layer)}
            continue
        found = {name: named[name] for name in fnmatch.filter(named, pattern) if name}
        if not found:
            warnings.warn(
                f"`LowPrecision(keep_fp32)` names {pattern!r}, but the model has no layer of that name, so "
                "this has no effect. Use names of `model.named_modules()`, in which * stands for any text.",
                NoEffectWarning,
                stacklevel=2,
            )
        for name, layer in found.items():
            if isinstance(layer, torch.jit.ScriptModule):
                raise MisconfigurationException(
                    f"`LowPrecision(keep_fp32)` names layers whose forward can be changed, but got "
                    f"{pattern!r}, which is the TorchScript module {name!r}. Put it into a module of your "
                    "own, whose `forward` calls it, and name that."
                )
        chosen |= found
    return [layer for name, layer in chosen.items() if not _has_parent_in(name, chosen)]


def _has_parent_in(name: str, chosen: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in chosen for end in range(1, len(parts)))


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer is a normalisation: one of torch's, or by its name one of another library.

    Args:
        layer: any.

    Returns:
        ``True`` for a class whose name ends in ``Norm``, unless it consists of other layers.
    """
    if isinstance(layer, (*BATCH_NORMS, *LAYER_NORMS)):
        return True
    return type(layer).__name__.endswith("Norm") and not any(layer.children())
