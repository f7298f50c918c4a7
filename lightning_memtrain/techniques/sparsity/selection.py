"""Which layers become sparse."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.techniques.sparsity.distributions import check_sparsity

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHORTCUTS = ("*shortcut*", "*downsample*", "*skip*")


@dataclass(frozen=True)
class Select:
    """Says which layers become sparse: by type, and by name those that do not.

    Only weights of linear and convolution layers can be sparse. Depthwise convolutions, frozen layers and
    layers whose weight is computed (weight norm and other parametrizations) stay dense. In a model with
    convolutions, so do by default the first convolution, shortcuts (1x1 convolutions below a module with
    "shortcut", "downsample" or "skip" in its name) and the last linear layer: they hold few weights, which
    count for much.

    Args:
        types: class names or classes.
        dense: paths of layers that stay dense, ``*`` stands for any text.
        overrides: fraction of zeros of single layers by path, ``*`` stands for any text.
        dense_ends: whether first convolution, shortcuts and last linear layer of a convolutional network stay
            dense.

    Raises:
        MisconfigurationException: if an argument is out of its range; at the start of the run, if a name
            matches no layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> list(Select().layers(model)), list(Select(dense_ends=False).layers(model))
        (['1'], ['0', '1', '3'])
    """

    types: Sequence[str | type[nn.Module]] = ("Linear", "Conv1d", "Conv2d", "Conv3d")
    dense: Sequence[str] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)
    dense_ends: bool = True

    def __post_init__(self) -> None:
        _check_list("types", self.types, (str, type), "class names or classes", "['Linear', 'Conv2d']")
        _check_list("dense", self.dense, (str,), "paths of layers", "['encoder.*', 'head']")
        if not self.types:
            raise MisconfigurationException(
                "`Select(types)` must name at least one type, but got an empty list. Leave it out for linear "
                "and convolution layers."
            )
        if not isinstance(self.overrides, Mapping):
            raise MisconfigurationException(
                "`Select(overrides)` must map paths of layers to fractions of zeros, but got "
                f"overrides={self.overrides!r}. Write e.g. {{'head': 0.5}}."
            )
        for name, sparsity in self.overrides.items():
            check_sparsity(sparsity, f"Select(overrides)[{name!r}]")

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Layers to make sparse.

        Args:
            model: the module that is trained.

        Returns:
            By path, in the order of the model.

        Raises:
            MisconfigurationException: if a name of ``dense`` matches no layer with a weight.
        """
        weighted = {name: layer for name, layer in model.named_modules() if _has_weight(layer)}
        for pattern in self.dense:
            if not any(fnmatchcase(name, pattern) for name in weighted):
                near = difflib.get_close_matches(pattern, weighted, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(weighted)}."
                raise MisconfigurationException(
                    f"`Select(dense)` must name layers of {type(model).__name__}, but {pattern!r} matches "
                    f"none. {hint}"
                )
        ends = _ends(weighted) if self.dense_ends else set()
        return {
            name: layer
            for name, layer in weighted.items()
            if any(_is_a(layer, kind) for kind in self.types)
            and name not in ends
            and not any(fnmatchcase(name, pattern) for pattern in self.dense)
            and layer._parameters["weight"].requires_grad
            and not _is_depthwise(layer)
        }


def has_weights(model: nn.Module) -> bool:
    """Whether layers to choose from have been made.

    Args:
        model: perhaps before its ``configure_model``.

    Returns:
        ``True`` also if they are sparse already.
    """
    return any(isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) for layer in model.modules())


def _has_weight(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and weight is not None


def _is_a(layer: nn.Module, kind: str | type[nn.Module]) -> bool:
    if isinstance(kind, type):
        return isinstance(layer, kind)
    return any(base.__name__ == kind for base in type(layer).__mro__)


def _is_depthwise(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.modules.conv._ConvNd)
        and layer.groups > 1
        and not is_lazy(layer.weight)
        and layer.weight.shape[1] == 1
    )


def _ends(layers: Mapping[str, nn.Module]) -> set[str]:
    convolutions = [name for name, layer in layers.items() if isinstance(layer, _CONVOLUTIONS)]
    if not convolutions:
        return set()
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    shortcuts = [
        name
        for name in convolutions
        if any(fnmatchcase(name, pattern) for pattern in _SHORTCUTS)
        and all(size == 1 for size in layers[name].kernel_size)  # type: ignore[union-attr]
    ]
    return {convolutions[0], *linear[-1:], *shortcuts}


def _check_list(name: str, given: Any, kinds: tuple[type, ...], what: str, example: str) -> None:
    if isinstance(given, (str, type)) or not all(isinstance(one, kinds) for one in given):
        raise MisconfigurationException(
            f"`Select({name})` must be a list of {what}, but got {name}={given!r}. Write e.g. {example}."
        )
