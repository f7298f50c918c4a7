"""Models in half precision, in place, with layers that are kept in float32."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_memtrain.core import NoEffectWarning

NORM = "norm"

_BATCH_NORMS = (nn.modules.batchnorm._NormBase,)
_LAYER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def convert_module_(module: nn.Module, dtype: torch.dtype, keep_fp32: Sequence[str] = (NORM,)) -> None:
    """Cast floating-point parameters and buffers in place, and keep those of some layers in float32.

    A kept layer works with half-precision inputs and answers in their dtype. Batch and instance normalisation
    do so by themselves; layer, group and root-mean-square normalisation run with their weights cast on the
    fly, so that their activations stay in half precision; any other layer computes in float32.

    Metrics of torchmetrics and complex numbers are left alone. Once converted, a model can be converted
    again, which changes nothing.

    Args:
        module: the model.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        keep_fp32: ``"norm"`` for all normalisations, and names of layers, in which ``*`` stands for any text.

    Warns:
        NoEffectWarning: if a name matches no layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> convert_module_(model, torch.bfloat16, keep_fp32=("norm", "2"))
        >>> [layer.weight.dtype for layer in model]
        [torch.bfloat16, torch.float32, torch.float32]
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    kept = _kept_layers(module, keep_fp32)
    inside = {id(m) for layer in kept for m in layer.modules()}
    metrics = {id(m) for metric in module.modules() if isinstance(metric, Metric) for m in metric.modules()}
    in_fp32 = {id(p) for layer in kept for p in layer.parameters()}  # also if tied to one elsewhere
    for layer in module.modules():
        if id(layer) in metrics:
            continue
        for parameter in layer._parameters.values():
            if parameter is not None:
                _cast_(parameter, torch.float32 if id(parameter) in in_fp32 else dtype)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                layer._buffers[name] = buffer.to(torch.float32 if id(layer) in inside else dtype)
        if isinstance(layer, _DeviceDtypeModuleMixin):
            layer._dtype = dtype
    for layer in kept:
        _accept_half(layer)


def _cast_(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if parameter.is_floating_point() and parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)
        if parameter.grad is not None:
            parameter.grad = None


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
    if isinstance(layer, (*_BATCH_NORMS, *_LAYER_NORMS)):
        return True
    return type(layer).__name__.endswith("Norm") and not any(layer.children())


def _accept_half(layer: nn.Module) -> None:
    if isinstance(layer, _BATCH_NORMS) or "forward" in vars(layer):
        return
    own = type(layer).forward
    forward = _in_fp32
    for kind, replacement in _CASTING_FORWARDS.items():
        if own is kind.forward:
            forward = replacement
    layer.forward = _ForwardOf(layer, forward)


class _ForwardOf:
    """A forward of one layer; its copies are of the copied layer.

    A bound method would be unpickled by its name, which the layer's class does not have.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self._layer = layer
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self._layer, *args, **kwargs)


def _in_fp32(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compute in float32; answer in the dtype that was asked in."""
    dtypes: list[torch.dtype] = []

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        dtypes.append(value.dtype)
        return value.float() if value.dtype.itemsize < 4 else value

    args, kwargs = tree_map(widen, (args, kwargs))
    outputs = type(layer).forward(layer, *args, **kwargs)
    if not dtypes or dtypes[0].itemsize >= 4:
        return outputs
    return tree_map(
        lambda x: x.to(dtypes[0]) if isinstance(x, Tensor) and x.is_floating_point() else x, outputs
    )


def _like(parameter: Tensor | None, inputs: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(inputs.dtype)


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor) -> Tensor:
    weight, bias = _like(layer.weight, inputs), _like(layer.bias, inputs)
    return F.layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps)


def _group_norm(layer: nn.GroupNorm, inputs: Tensor) -> Tensor:
    weight, bias = _like(layer.weight, inputs), _like(layer.bias, inputs)
    return F.group_norm(inputs, layer.num_groups, weight, bias, layer.eps)


def _rms_norm(layer: nn.RMSNorm, inputs: Tensor) -> Tensor:
    return F.rms_norm(inputs, layer.normalized_shape, _like(layer.weight, inputs), layer.eps)


_CASTING_FORWARDS: dict[type[nn.Module], Any] = {
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.RMSNorm: _rms_norm,
}
