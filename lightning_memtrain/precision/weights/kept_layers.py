"""Which layers of a model are kept in float32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.module_selectors import (
    Selector,
    matches_nothing,
    selector_name,
    selects,
)
from lightning_memtrain.precision.weights.layer_forwards import BATCH_NORMS, LAYER_NORMS

#: Stands for all normalisations among the names of layers.
NORM = "norm"


def kept_layers(module: nn.Module, keep_in_fp32: Sequence[Selector]) -> list[nn.Module]:
    """The layers that are to be kept in float32, without those that are in another one of them.

    Args:
        module: the model.
        keep_in_fp32: ``"norm"`` for all normalisations, names of layers, in which ``*`` stands for any text,
            names of classes, and classes.

    Returns:
        Layers, in the order in which they are chosen.

    Raises:
        ArgumentError: if something matches no layer, other than ``"norm"``, or a TorchScript
            module, whose forward is what it is.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU())
        >>> [type(layer).__name__ for layer in kept_layers(model, ["norm", "2"])]
        ['LayerNorm', 'ReLU']
    """
    named = dict(module.named_modules(remove_duplicate=False))  # any of a layer's names will do
    chosen: dict[str, nn.Module] = {}
    for selector in keep_in_fp32:
        found = {name: layer for name, layer in named.items() if is_kept(selector, name, layer)}
        if not found and selector != NORM:
            raise matches_nothing("LowPrecision(keep_in_fp32)", selector, named)
        for name, layer in found.items():
            if isinstance(layer, torch.jit.ScriptModule):
                raise ArgumentError(
                    f"`LowPrecision(keep_in_fp32)` must name layers whose forward can be changed, but got "
                    f"{selector!r}, which is the TorchScript module {name!r}. Put it into a module of your "
                    "own, whose `forward` calls it, and name that."
                )
        chosen |= found
    layers = list(dict.fromkeys(chosen.values()))
    inner = {id(one) for layer in layers for one in layer.modules() if one is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def is_kept(selector: Selector, name: str, layer: nn.Module) -> bool:
    """Whether a layer is meant.

    Args:
        selector: one of ``keep_in_fp32``.
        name: of the layer in its model; that of the model is empty, and it is never meant but by ``"norm"``.
        layer: the layer.

    Returns:
        Whether it is one of those that are kept in float32.
    """
    if selector == NORM:
        return is_norm(layer)
    return bool(name) and selects(selector, name, layer)


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


def with_tied(module: nn.Module, kept: list[nn.Module]) -> list[nn.Module]:
    """Layers that are kept, and those without inner ones that share a parameter, as tied heads do.

    Args:
        module: the model.
        kept: some of its layers.

    Returns:
        ``kept``, and the others after them.
    """
    kept = list(kept)
    while True:
        inside = ids_inside(kept)
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


def ids_inside(layers: Iterable[nn.Module]) -> set[int]:
    """Identities of layers and of all in them.

    Args:
        layers: any.

    Returns:
        What ``id`` gives for each.
    """
    return {id(inner) for layer in layers for inner in layer.modules()}


def format_selectors(selectors: Sequence[Selector]) -> str:
    """A value of ``keep_in_fp32`` as one would write it.

    Args:
        selectors: names of layers and classes, and classes.

    Returns:
        E.g. ``("norm",)``.
    """
    quoted = ", ".join(f'"{selector_name(selector)}"' for selector in selectors)
    return f"({quoted},)" if len(selectors) == 1 else f"({quoted})"
