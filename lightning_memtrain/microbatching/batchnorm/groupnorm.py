"""Batch norm replaced by group norm, which no split of the batch can change."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_memtrain.compat.torch_private import BatchNorm
from lightning_memtrain.core import ArgumentError, NoEffectWarning
from lightning_memtrain.core.arguments.value_checks import check_counts, check_modules


def batchnorm_to_groupnorm(model: nn.Module, num_groups: int = 32) -> nn.Module:
    """Replace every batch norm layer by group norm, in place.

    Group norm normalises each sample by itself, so chunks of a batch give the gradient of the whole batch.
    It is another network: train it from its start, since statistics that batch norm has learned are dropped.

    Each layer gets the largest divisor of its channels that is not above ``num_groups``. It keeps the layer's
    own weight and bias parameters (so values, device, dtype and ``requires_grad``), ``eps`` and training
    mode; a layer that is used in several places stays one layer. Hooks on a layer are not carried over.

    A ``BatchNorm1d`` may get inputs of shape ``(batch, channels)``, for which group norm works too. There a
    group of one channel would hold one value, and its output would be the bias whatever the input. So
    ``BatchNorm1d`` becomes groups of at least two channels; for such inputs a small ``num_groups``, down to
    1, keeps more of the signal.

    Args:
        model: converted in place, unless it is itself a batch norm layer.
        num_groups: most groups of one layer, at least 1.

    Returns:
        ``model``, or the group norm in its stead if ``model`` is itself a batch norm layer.

    Raises:
        ArgumentError: if ``num_groups`` is below 1, or a lazy layer does not know its channels yet. The model
            is then as it was.

    Warns:
        NoEffectWarning: if the model has no batch norm layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48))
        >>> batchnorm_to_groupnorm(model)[1].num_groups
        24

    References:
        Wu and He, Group Normalization, ECCV 2018, arXiv:1803.08494.
    """
    check_modules("batchnorm_to_groupnorm", model=model)
    cure = "Use 32, the paper's choice, or 1 to normalise over all channels."
    check_counts("batchnorm_to_groupnorm", cure=cure, num_groups=num_groups)
    replacements: dict[nn.Module, nn.Module] = {
        module: _group_norm(name, module, num_groups)
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
    }
    if not replacements:
        warnings.warn(
            "`batchnorm_to_groupnorm(model)` expects a model with batch norm layers, but "
            f"{type(model).__name__} has none. Leave the call out.",
            NoEffectWarning,
            stacklevel=2,
        )
    for parent in list(model.modules()):
        # `named_children` would name a shared layer only once.
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _group_norm(name: str, layer: BatchNorm, num_groups: int) -> nn.GroupNorm:
    if isinstance(layer, LazyModuleMixin):
        raise ArgumentError(
            "`batchnorm_to_groupnorm(model)` must know the channels of every layer, but got the lazy layer "
            f"{name or type(layer).__name__!r}. Run the model once before, or use a layer that is not lazy."
        )
    channels = layer.num_features
    most = min(num_groups, max(1, channels // 2)) if isinstance(layer, nn.BatchNorm1d) else num_groups
    divisor = max(groups for groups in range(1, min(most, channels) + 1) if channels % groups == 0)
    group_norm = nn.GroupNorm(divisor, channels, eps=layer.eps, affine=False)
    # The very parameters, so that an optimizer or a second owner keeps hold of them.
    group_norm.affine = layer.affine
    group_norm.weight, group_norm.bias = layer.weight, layer.bias
    return group_norm.train(layer.training)
