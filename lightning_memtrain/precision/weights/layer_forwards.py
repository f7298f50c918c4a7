"""Forwards of single layers, so that float32 weights go with inputs in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import NormBase, tree_leaves, tree_map
from lightning_memtrain.precision.half_dtypes import HALF_DTYPES

BATCH_NORMS = (NormBase,)
LAYER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

#: Computes in place of a layer's own forward, which it gets as the first argument.
Forward = Callable[..., Any]


def replace_forwards(module: nn.Module, forwards: Mapping[nn.Module, Forward | None]) -> None:
    """Give layers another forward, and take away what was given to others before.

    Args:
        module: the model.
        forwards: by layer; ``None`` for its own. Layers that somebody else has given one keep it.
    """
    for layer in module.modules():
        if isinstance(layer, torch.jit.ScriptModule):
            continue
        wanted, found = forwards.get(layer), vars(layer).get("forward")
        if found is not None and not isinstance(found, LayerForward):
            continue
        if wanted is None and found is not None:
            del layer.forward
        elif wanted is not None and (found is None or not found.is_like(wanted)):
            layer.forward = LayerForward(layer, wanted)


def float32_forward(layer: nn.Module, dtype: torch.dtype) -> Forward | None:
    """How a layer that is kept in float32 computes.

    Args:
        layer: the layer.
        dtype: in which it answers if it gets no floating-point number.

    Returns:
        ``None`` if its own forward will do.
    """
    if isinstance(layer, BATCH_NORMS):
        return None
    own = type(layer).forward
    for kind, replacement in _CASTING_FORWARDS.items():
        if own is kind.forward:
            return replacement
    return partial(_forward_in_float32, default_dtype=dtype)


class LayerForward:
    """A forward of one layer; its copies are of the copied layer.

    A bound method would be unpickled by its name, which the layer's class does not have.

    Args:
        layer: the layer.
        forward: takes it and its inputs.
    """

    def __init__(self, layer: nn.Module, forward: Forward) -> None:
        self._layer = layer
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer answers."""
        return self._forward(self._layer, *args, **kwargs)

    def is_like(self, forward: Forward) -> bool:
        """Whether it computes as another one would."""
        pair = self._forward, forward
        if isinstance(pair[0], partial) and isinstance(pair[1], partial):
            return pair[0].func is pair[1].func and pair[0].keywords == pair[1].keywords
        return pair[0] is pair[1]


def _forward_in_float32(layer: nn.Module, *args: Any, default_dtype: torch.dtype, **kwargs: Any) -> Any:
    """Compute in float32; answer in the dtype of the inputs."""
    input_dtype = _input_dtype(args, kwargs)
    upcast = tree_map(lambda x: x.float() if _is_half(x) else x, (args, kwargs))
    outputs = type(layer).forward(layer, *upcast[0], **upcast[1])
    input_dtype = default_dtype if input_dtype is None else input_dtype
    return _cast(outputs, input_dtype) if input_dtype in HALF_DTYPES else outputs


def forward_in_input_dtype(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compute as ever; what became float32 by a buffer in float32 is cast to the dtype of the inputs.

    Args:
        layer: one with buffers in float32.
        *args: of its forward; tensors of any shapes and dtypes.
        **kwargs: of its forward.

    Returns:
        What the layer answers, floating-point tensors in the dtype of the first such input if that is a half
        precision.
    """
    input_dtype = _input_dtype(args, kwargs)
    outputs = type(layer).forward(layer, *args, **kwargs)
    return _cast(outputs, input_dtype) if input_dtype in HALF_DTYPES else outputs


def _input_dtype(*inputs: Any) -> torch.dtype | None:
    dtypes = (x.dtype for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point())
    return next(dtypes, None)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF_DTYPES


def _cast(outputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, outputs)


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


_CASTING_FORWARDS: dict[type[nn.Module], Forward] = {
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.RMSNorm: _rms_norm,
}
