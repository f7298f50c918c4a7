"""Batch norm replaced by a normalisation that no split of the batch can change."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_memtrain.compat.torch_private import BatchNorm
from lightning_memtrain.core import ArgumentError, NoEffectWarning
from lightning_memtrain.core.arguments.value_checks import check_kinds, check_modules
from lightning_memtrain.microbatching.normalization.sample_norms import SampleNorm

_FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)


def replace_batchnorm(model: nn.Module, norm: SampleNorm) -> nn.Module:
    """Replace every batch norm layer by one that normalises each sample by itself, in place.

    Chunks of a batch then give the gradient of the whole batch, whatever their size. It is another network:
    train it from its start, or go on training. Of pretrained weights, the convolutions and batch norm's own
    weight and bias are kept; the running statistics are not, and outputs differ from the first sample on.
    :class:`CenteredWeights` makes up for a part of what such a norm cannot do.

    A layer that is used in several places stays one layer. Hooks on a layer are not carried over.

    Args:
        model: converted in place, unless it is itself a batch norm layer.
        norm: what comes in the place of batch norm.

    Returns:
        ``model``, or the new layer if ``model`` is itself a batch norm layer.

    Raises:
        ArgumentError: naming a layer that cannot be replaced: a lazy one that does not know its channels yet,
            one of a class with a forward of its own, which may do more than normalise, one whose weight is
            computed from other parameters, or one in a scripted module. The model is then as it was.

    Warns:
        NoEffectWarning: if the model has no batch norm layer.

    Example:
        >>> from lightning_memtrain.microbatching import GroupNorm
        >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48))
        >>> replace_batchnorm(model, GroupNorm(num_groups=32))[1].num_groups
        24
    """
    check_modules("replace_batchnorm", model=model)
    cure = "Use e.g. GroupNorm(channels_per_group=4)."
    check_kinds("replace_batchnorm", SampleNorm, "a SampleNorm such as GroupNorm()", cure, norm=norm)
    layers = dict(model.named_modules())
    for name, layer in layers.items():
        _refuse(name, layer)
    replacements: dict[nn.Module, nn.Module] = {
        layer: norm.layer_for(layer) for layer in layers.values() if isinstance(layer, BatchNorm)
    }
    if not replacements:
        warnings.warn(
            "`replace_batchnorm(model)` expects a model with batch norm layers, but "
            f"{type(model).__name__} has none. Leave the call out.",
            NoEffectWarning,
            stacklevel=2,
        )
    for parent in layers.values():
        # `named_children` would name a shared layer only once.
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _refuse(name: str, layer: nn.Module) -> None:
    if isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in layer.original_name:
        raise ArgumentError(
            "`replace_batchnorm(model)` must have layers that can be replaced, but got the scripted layer "
            f"{name or layer.original_name!r}. Replace before `torch.jit.script`."
        )
    if not isinstance(layer, BatchNorm):
        return
    kind = type(layer)
    shown = repr(name or kind.__name__)
    if isinstance(layer, LazyModuleMixin):
        raise ArgumentError(
            "`replace_batchnorm(model)` must know the channels of every layer, but got the lazy layer "
            f"{shown}. Run the model once before, or use a layer that is not lazy."
        )
    if kind.forward not in _FORWARDS or "forward" in vars(layer):
        raise ArgumentError(
            f"`replace_batchnorm(model)` must have batch norm layers of torch, but got {shown} of the class "
            f"{kind.__name__}, whose forward may do more than normalise. Build the model with torch's own "
            "layers."
        )
    if layer.affine and layer._parameters.get("weight") is None:
        raise ArgumentError(
            f"`replace_batchnorm(model)` must have layers with a weight of their own, but that of {shown} is "
            "computed from other parameters. Remove the parametrization or the pruning before."
        )
