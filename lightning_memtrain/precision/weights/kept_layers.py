"""Which layers of a model are kept in float32."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.precision.weights.layer_forwards import BATCH_NORMS, LAYER_NORMS

#: Stands for all normalisations among the names of layers.
NORM = "norm"


def kept_layers(module: nn.Module, keep_in_fp32: Sequence[str]) -> list[nn.Module]:
    """The layers that are to be kept in float32, without those that are in another one of them.

    Args:
        module: the model.
        keep_in_fp32: ``"norm"`` for all normalisations, and names of layers, in which ``*`` stands for any
            text.

    Returns:
        Layers, in the order of their names in ``keep_in_fp32``.

    Raises:
        MisconfigurationException: if a name is that of a TorchScript module, whose forward is what it is.

    Warns:
        NoEffectWarning: if a name matches no layer.
    """
    named = dict(module.named_modules())
    chosen: dict[str, nn.Module] = {}
    for pattern in keep_in_fp32:
        if pattern == NORM:
            chosen |= {name: layer for name, layer in named.items() if is_norm(layer)}
            continue
        found = {name: named[name] for name in fnmatch.filter(named, pattern) if name}
        if not found:
            warnings.warn(
                f"`LowPrecision(keep_in_fp32)` names {pattern!r}, but the model has no layer of that name, "
                "so this has no effect. Use names of `model.named_modules()`, in which * stands "
                "for any text.",
                NoEffectWarning,
                stacklevel=2,
            )
        for name, layer in found.items():
            if isinstance(layer, torch.jit.ScriptModule):
                raise MisconfigurationException(
                    f"`LowPrecision(keep_in_fp32)` names layers whose forward can be changed, but got "
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


def format_names(names: Sequence[str]) -> str:
    """A tuple of names as one would write it.

    Args:
        names: e.g. those of layers.

    Returns:
        E.g. ``("norm",)``.
    """
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"({quoted},)" if len(names) == 1 else f"({quoted})"
