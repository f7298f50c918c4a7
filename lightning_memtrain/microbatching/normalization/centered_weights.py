r"""Filters whose weights sum to zero.

Behind a ReLU all inputs of a filter are positive. What they have in common then shifts the filter's output by
its own sum of weights, the same way in every sample. Batch norm takes that shift away channel by channel;
group norm cannot, since it knows only the mean of a group. Weights :math:`w` that are kept in the plane
:math:`\sum_i w_i = 0` of each filter do not make it in the first place.

Standardised weights do so inside forward, :math:`\hat w = (w - \bar w) / \sigma_w`, at the price of a second
copy of every weight from forward to backward. Here the weights themselves are moved back into the plane after
each step, :math:`w \leftarrow w - \bar w`. For optimizers that are linear in the gradient, such as SGD with
momentum and weight decay, that is the same training as with :math:`w - \bar w` inside forward, because the
projection passes through sums.

A length :math:`\ell` of each filter is kept likewise, :math:`w \leftarrow \ell w / \lVert w \rVert`;
standardised weights are those of length 1. That is no longer the same training as a division within forward,
where the length of the weights behind it goes on to move, and with it how far a step turns them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_memtrain.compat.torch_private import ConvNd, ConvTransposeNd
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.module_selectors import Selector, as_selectors, selected
from lightning_memtrain.core.arguments.value_checks import check_modules, check_numbers
from lightning_memtrain.core.stored_entries import StoresEntries

SELECTORS_CURE = "Write e.g. ['layers.*']; leave it out for all convolutions of more than 4 channels."
_IMAGE_CHANNELS = 4
_SHORTEST = 1e-12  # a filter of zeros stays one


def center_weights_(
    model: nn.Module, layers: Sequence[Selector] | None = None, length: float | None = None
) -> list[str]:
    """Subtract from each filter of convolutions the mean of its weights, in place.

    For loops of your own: call it before training and after each step of the optimizer. In a Trainer,
    :class:`CenteredWeights` does. Of sparse layers the stored entries are centred.

    Args:
        model: any module.
        layers: see :class:`CenteredWeights`.
        length: see :class:`CenteredWeights`.

    Returns:
        Paths of the layers whose weights are centred.

    Raises:
        ArgumentError: see :class:`CenteredWeights`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> center_weights_(model)
        ['3']
        >>> bool(model[3].weight.sum((1, 2, 3)).abs().max() < 1e-6)
        True
    """
    check_modules("center_weights_", model=model)
    if layers is not None:
        layers = as_selectors("center_weights_", SELECTORS_CURE, layers=layers)
    check_length("center_weights_", length)
    found = layers_to_center("center_weights_", model, layers)
    center(found.values(), length)
    return list(found)


def layers_to_center(owner: str, model: nn.Module, layers: Sequence[Selector] | None) -> dict[str, ConvNd]:
    """Find the convolutions whose weights are to be centred.

    Args:
        owner: what the user has called.
        model: any module.
        layers: of the user; ``None`` for the default.

    Returns:
        By path.

    Raises:
        ArgumentError: naming a layer whose weights cannot be centred.
    """
    convolutions = {path: module for path, module in model.named_modules() if isinstance(module, ConvNd)}
    if layers is None:
        found = {path: one for path, one in convolutions.items() if _is_meant(one) and _is_trained(one)}
    else:
        paths = selected(f"{owner}(layers)", layers, convolutions)
        found = {path: one for path, one in convolutions.items() if path in paths}
    for path, layer in found.items():
        _refuse(owner, path or type(layer).__name__, layer)
    return found


def check_length(owner: str, length: float | None) -> None:
    """Refuse what is no length.

    Args:
        owner: what the user has called.
        length: of the user.
    """
    if length is not None:
        cure = "Use 1.0, that of standardised weights, or None to leave it to training."
        check_numbers(owner, "a number above 0, or None", lambda number: number > 0, cure, length=length)


@torch.no_grad()
def center(layers: Iterable[ConvNd], length: float | None) -> None:
    """Subtract the mean of each filter, and give it a length.

    Args:
        layers: convolutions that :func:`layers_to_center` found.
        length: above 0; ``None`` to leave it.
    """
    for layer in layers:
        if isinstance(layer, StoresEntries):
            _center_stored(layer, layer, length)
        else:
            _center_dense(layer, length)


def _center_dense(layer: ConvNd, length: float | None) -> None:
    weight = layer.weight
    accurate = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(layer, ConvTransposeNd):
        # Inputs come first: those of one group, for each of its outputs.
        weight = weight.unflatten(0, (layer.groups, -1))  # type: ignore[no-untyped-call]
        axes = (1, *range(3, weight.dim()))
    else:
        axes = tuple(range(1, weight.dim()))
    weight.sub_(weight.mean(axes, keepdim=True, dtype=accurate))
    if length is not None:
        lengths = torch.linalg.vector_norm(weight, dim=axes, keepdim=True, dtype=accurate)
        weight.mul_(length / lengths.clamp_(min=_SHORTEST))


def _center_stored(layer: ConvNd, stored: StoresEntries, length: float | None) -> None:
    values = stored.values
    filters = _filters(layer, stored.dense_shape, stored.positions())
    accurate = torch.promote_types(values.dtype, torch.float32)
    sums = values.new_zeros(layer.out_channels, dtype=accurate)
    counts = torch.zeros_like(sums).index_add_(0, filters, torch.ones_like(values, dtype=sums.dtype))
    sums.index_add_(0, filters, values.to(sums.dtype))
    means = sums.div_(counts.clamp_(min=1))
    values.sub_(means.index_select(0, filters))
    if length is not None:
        squares = torch.zeros_like(sums).index_add_(0, filters, values.to(sums.dtype).square())
        factors = length / squares.sqrt_().clamp_(min=_SHORTEST)
        values.mul_(factors.index_select(0, filters))


def _filters(layer: ConvNd, shape: torch.Size, positions: Tensor) -> Tensor:
    """The number of the output channel that each position of the dense weight belongs to."""
    inner = math.prod(shape[1:])
    if not isinstance(layer, ConvTransposeNd):
        return positions.div_(inner, rounding_mode="floor")
    inputs, rest = positions // inner, positions % inner
    group = inputs.div_(layer.in_channels // layer.groups, rounding_mode="floor")
    return group.mul_(shape[1]).add_(rest.div_(inner // shape[1], rounding_mode="floor"))


def _is_meant(layer: ConvNd) -> bool:
    """Whether many channels go into a filter: not those of an image, nor one, as in depthwise layers."""
    if isinstance(layer, LazyModuleMixin):  # nobody knows yet, so that it is refused
        return True
    return layer.in_channels > _IMAGE_CHANNELS and layer.in_channels // layer.groups > 1


def _own_parameter(layer: ConvNd) -> nn.Parameter | None:
    if isinstance(layer, StoresEntries):
        return layer.values
    return layer._parameters.get("weight")


def _is_trained(layer: ConvNd) -> bool:
    parameter = _own_parameter(layer)
    return parameter is None or parameter.requires_grad


def _refuse(owner: str, path: str, layer: ConvNd) -> None:
    parameter = _own_parameter(layer)
    if isinstance(layer, torch.jit.ScriptModule) or parameter is None:
        raise ArgumentError(
            f"`{owner}(layers)` must be convolutions with a weight of their own, but that of {path!r} is "
            "computed from other parameters (a parametrization, weight norm, pruning). Name the others in "
            "`layers`, or remove it."
        )
    if is_lazy(parameter):
        raise ArgumentError(
            f"`{owner}(layers)` must be convolutions whose weights exist, but {path!r} is lazy. Run the "
            "model once before, or use a layer that is not lazy."
        )
    if not parameter.requires_grad:
        raise ArgumentError(
            f"`{owner}(layers)` must be convolutions that are trained, but {path!r} is frozen. Leave it out."
        )
    whole = isinstance(layer, StoresEntries) or parameter.dim() == len(layer.kernel_size) + 2
    if isinstance(parameter, DTensor) or not whole:
        raise ArgumentError(
            f"`{owner}(layers)` must be convolutions whose weights are whole on every rank, but that of "
            f"{path!r} is divided among ranks. Train under DDP or on one device."
        )
