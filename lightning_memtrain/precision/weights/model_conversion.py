"""Models in half precision, in place, with layers and buffers that are kept in float32."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torchmetrics import Metric

from lightning_memtrain.compat.lightning_packages import in_both
from lightning_memtrain.compat.lightning_private import DeviceDtypeModuleMixin
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.module_selectors import Selector, as_selectors
from lightning_memtrain.core.arguments.value_checks import check_modules
from lightning_memtrain.precision.half_dtypes import HALF_DTYPES
from lightning_memtrain.precision.weights.converted_buffers import BufferPlan, ConvertedBuffers, NamedBuffer
from lightning_memtrain.precision.weights.kept_layers import (
    NORM,
    format_selectors,
    ids_inside,
    kept_layers,
    with_tied,
)
from lightning_memtrain.precision.weights.layer_forwards import (
    Forward,
    float32_forward,
    forward_in_input_dtype,
    replace_forwards,
)


def convert_to_low_precision_(
    module: nn.Module, dtype: torch.dtype = torch.bfloat16, keep_in_fp32: Sequence[Selector] = (NORM,)
) -> ConvertedBuffers:
    """Cast floating-point parameters and buffers in place, and keep those of some layers in float32.

    A kept layer works with half-precision inputs and answers in their dtype, or in half precision if it gets
    no floating-point number; so does a layer that shares a parameter with it. Batch and instance
    normalisation do so by themselves; layer, group and root-mean-square normalisation run with their weights
    cast on the fly, so that their activations stay in half precision; any other layer computes in float32.

    Whatever is named, some buffers stay in float32: those that count or average (see :class:`BufferUsage`),
    those of a single number, and those of whole numbers that ``dtype`` does not have. A layer that has such
    buffers, and hardly more parameters, is kept as a whole. Another one answers in the dtype of its inputs;
    of its buffers those are cast, after all, that are written by operators which want all in one dtype.

    Metrics of torchmetrics and complex numbers are left alone. Once converted, a model can be converted
    again, which changes nothing.

    Args:
        module: the model; its parameters and buffers are of any shapes and dtypes.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        keep_in_fp32: ``"norm"`` for all normalisations, names of layers, in which ``*`` stands for any text,
            names of classes, and classes.

    Returns:
        What became of its buffers.

    Raises:
        ArgumentError: if ``dtype`` is no half precision, or ``keep_in_fp32`` no sequence of names,
            or if a name matches no layer, or a TorchScript module, whose forward is what it is.

    Warns:
        UserWarning: if the code of the model averages weights that are cast, as those of a mean teacher.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> convert_to_low_precision_(model, keep_in_fp32=("norm", "2"))
        ConvertedBuffers(kept=[], unclear=[])
        >>> [layer.weight.dtype for layer in model]
        [torch.bfloat16, torch.float32, torch.float32]
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    check_modules("convert_to_low_precision_", module=module)
    if dtype not in HALF_DTYPES:
        raise ArgumentError(
            "`convert_to_low_precision_(dtype)` must be torch.bfloat16 or torch.float16, but got "
            f"dtype={dtype}. Use one of them, or `module.to(dtype)`."
        )
    cure = 'Write it as a tuple, e.g. ("norm", "head").'
    as_selectors("convert_to_low_precision_", cure, least=0, keep_in_fp32=keep_in_fp32)
    named = kept_layers(module, keep_in_fp32)
    metrics = _metrics(module)
    plan = BufferPlan(module, dtype, leave_out=ids_inside(named) | metrics)
    kept = with_tied(module, [*named, *plan.kept_layers])
    inside = ids_inside(kept)
    in_fp32 = {id(p) for layer in kept for p in layer.parameters()}  # also if tied to one elsewhere
    converted = ConvertedBuffers([], [])
    for name_of_layer, layer in module.named_modules():
        if id(layer) in metrics:
            continue
        for parameter in layer._parameters.values():
            if parameter is not None:
                _cast_(parameter, torch.float32 if id(parameter) in in_fp32 else dtype)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                found = NamedBuffer(layer, name, f"{name_of_layer}.{name}".lstrip("."))
                in_half = id(layer) not in inside and buffer.dim() > 0
                if in_half and name in plan.in_fp32.get(layer, ()):
                    in_half = False
                    converted.kept.append(found)
                elif in_half and name in plan.unclear.get(layer, ()):
                    converted.unclear.append(found)
                layer._buffers[name] = buffer.to(dtype if in_half else torch.float32)
        if isinstance(layer, in_both(DeviceDtypeModuleMixin)):
            layer._dtype = dtype
    _warn_of_averages(module, [layer for layer in plan.averaged if id(layer) not in inside], keep_in_fp32)
    forwards: dict[nn.Module, Forward | None] = {
        layer: forward_in_input_dtype
        for layer in plan.in_fp32
        if layer is not module and id(layer) not in inside
    }
    replace_forwards(module, forwards | {layer: float32_forward(layer, dtype) for layer in kept})
    return converted


def restore_float32_(module: nn.Module) -> None:
    """Make a converted model one in float32 again that knows nothing of half precision.

    Its numbers stay what they are, and its parameters the same objects.

    Args:
        module: the model.
    """
    check_modules("restore_float32_", module=module)
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
        if isinstance(layer, in_both(DeviceDtypeModuleMixin)):
            layer._dtype = torch.float32
    replace_forwards(module, {})


def _cast_(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if parameter.is_floating_point() and parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)
        if parameter.grad is not None:
            parameter.grad = None


def _warn_of_averages(module: nn.Module, averaged: list[nn.Module], keep_in_fp32: Sequence[Selector]) -> None:
    names = {id(layer): name for name, layer in module.named_modules()}
    in_half = [
        names[id(layer)] for layer in averaged if any(p.dtype in HALF_DTYPES for p in layer.parameters())
    ]
    if in_half:
        warnings.warn(
            f"`LowPrecision` casts {', '.join(map(repr, in_half))} to half precision, where most of what the "
            "code of the model adds to these weights to average them is lost. Keep them in float32 by "
            f"`LowPrecision(keep_in_fp32={format_selectors((*keep_in_fp32, *in_half))})`, and cast what "
            "`lerp_` and its like get by `.float()`.",
            stacklevel=2,
        )


def _metrics(module: nn.Module) -> set[int]:
    return ids_inside(layer for layer in module.modules() if isinstance(layer, Metric))
