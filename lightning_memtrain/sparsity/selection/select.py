"""Which layers become sparse."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.compat.torch_private import ConvNd
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.sparsity.methods.distributions import check_sparsity
from lightning_memtrain.sparsity.selection.layer_copies import LayerCopies, find_layer_copies
from lightning_memtrain.sparsity.selection.weight_locations import (
    WeightLocation,
    is_linear_or_convolution,
    weight_locations,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHORTCUTS = ("*shortcut*", "*downsample*", "*skip*")


DEFAULT_TYPES = (
    *("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("RNNBase", "RNNCellBase"),
    # Mixtures whose experts are slices of one parameter, as in transformers.
    "*Expert*",
)


@dataclass(frozen=True)
class Select:
    """Says which layers become sparse: by type, and by name those that do not.

    These may be linear, convolution, transposed convolution and recurrent layers, and modules with a
    parameter of three axes, one matrix for each expert. Such a parameter, and each weight of a recurrent
    layer, is a layer of its own here, by the name of the parameter. Depthwise convolutions, frozen layers and
    layers whose weight is computed (weight norm and other parametrizations) stay dense. In a model with
    convolutions, so do by default the first convolution, shortcuts (1x1 convolutions below a module with
    "shortcut", "downsample" or "skip" in its name) and the last linear layer: they hold few weights, which
    count for much.

    Args:
        types: class names, in which ``*`` stands for any text, or classes.
        dense: layers or other modules that stay dense: paths, in which ``*`` stands for any text, class
            names, or classes.
        overrides: fraction of zeros of single layers by path, ``*`` stands for any text.
        dense_ends: whether first convolution, shortcuts and last linear layer of a convolutional network stay
            dense.

    Raises:
        ArgumentError: if an argument is out of its range; at the start of the run, if a name
            matches no layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> list(Select().layers(model)), list(Select(dense_ends=False).layers(model))
        (['1'], ['0', '1', '3'])
    """

    types: Sequence[str | type[nn.Module]] = DEFAULT_TYPES
    dense: Sequence[str | type[nn.Module]] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)
    dense_ends: bool = True

    def __post_init__(self) -> None:
        _check_list("types", self.types, (str, type), "class names or classes", "['Linear', 'Conv2d']")
        _check_list("dense", self.dense, (str, type), "paths of layers or classes", "['encoder.*', 'head']")
        if not self.types:
            raise ArgumentError(
                "`Select(types)` must name at least one type, but got an empty list. Leave it out for linear "
                "and convolution layers."
            )
        if not isinstance(self.overrides, Mapping):
            raise ArgumentError(
                "`Select(overrides)` must map paths of layers to fractions of zeros, but got "
                f"overrides={self.overrides!r}. Write e.g. {{'head': 0.5}}."
            )
        for name, sparsity in self.overrides.items():
            check_sparsity(sparsity, f"Select(overrides)[{name!r}]")

    def keeps_dense(self, name: str, module: nn.Module) -> bool:
        """Whether a parameter is named as one that stays dense.

        Args:
            name: of the parameter.
            module: that has it.

        Returns:
            ``True`` where ``dense`` names the parameter or the module.
        """
        paths = name, name.rpartition(".")[0]
        return any(_is_named(path, module, wanted) for path in paths for wanted in self.dense)

    def unnamed_locations(self, model: nn.Module) -> dict[str, WeightLocation]:
        """Dense layers that are not among those that are named.

        Args:
            model: the module that is trained.

        Returns:
            By path.
        """
        locations = weight_locations(model)
        return {path: one for path, one in locations.items() if not self.keeps_dense(one.name, one.module)}

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Layers to make sparse.

        Args:
            model: the module that is trained.

        Returns:
            By path, in the order of the model.

        Raises:
            ArgumentError: if a name of ``dense`` matches no module with parameters.
        """
        return {path: location.module for path, location in self.choose(model)[0].items()}

    def choose(self, model: nn.Module) -> tuple[dict[str, WeightLocation], LayerCopies]:
        """Layers to make sparse, and which of them are copies of others.

        Args:
            model: the module that is trained.

        Returns:
            Layers by path, in the order of the model, and the copies, which are chosen as their originals.

        Raises:
            ArgumentError: if a name of ``dense`` matches no module with parameters.
        """
        locations = weight_locations(model)
        self._refuse_unknown(model, locations)
        named = {path for path, one in locations.items() if self.keeps_dense(one.name, one.module)}
        of_types = {
            path: location
            for path, location in locations.items()
            if any(_is_of_type(location.module, kind) for kind in self.types)
        }
        copies = find_layer_copies(of_types, named)
        own = {path: location for path, location in locations.items() if path not in copies.originals}
        ends = _dense_ends(own) if self.dense_ends else set()
        chosen = {
            path
            for path, location in of_types.items()
            if path in own
            and path not in named
            and path not in ends
            and location.parameter.requires_grad
            and not _is_depthwise(location)
        }
        originals = {c: of for c, of in copies.originals.items() if of in chosen and c not in named}
        layers = {
            path: location for path, location in locations.items() if path in chosen or path in originals
        }
        return layers, replace(copies, originals=originals)

    def _refuse_unknown(self, model: nn.Module, locations: Mapping[str, WeightLocation]) -> None:
        known = {path: module for path, module in model.named_modules() if module._parameters}
        known |= {path: location.module for path, location in locations.items()}
        for wanted in self.dense:
            if any(_is_named(path, module, wanted) for path, module in known.items()):
                continue
            word = wanted if isinstance(wanted, str) else wanted.__name__
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(locations)}."
            raise ArgumentError(
                f"`Select(dense)` must name layers of {type(model).__name__}, but {word!r} matches "
                f"none. {hint}"
            )


def has_selectable_layers(model: nn.Module) -> bool:
    """Whether layers to choose from have been made.

    Args:
        model: perhaps before its ``configure_model``.

    Returns:
        ``True`` also if they are sparse already.
    """
    has_layers = any(is_linear_or_convolution(module) for module in model.modules())
    return has_layers or bool(weight_locations(model))


def _is_named(path: str, module: nn.Module, wanted: str | type[nn.Module]) -> bool:
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    return type(module).__name__ == wanted or fnmatchcase(path, wanted)


def _is_of_type(module: nn.Module, kind: str | type[nn.Module]) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    return any(fnmatchcase(base.__name__, kind) for base in type(module).__mro__)


def _is_depthwise(location: WeightLocation) -> bool:
    module = location.module
    return (
        isinstance(module, ConvNd)
        and module.groups > 1
        and not is_lazy(location.parameter)
        and location.parameter.shape[1] == 1
    )


def _dense_ends(locations: Mapping[str, WeightLocation]) -> set[str]:
    convolutions = {
        path: location for path, location in locations.items() if isinstance(location.module, _CONVOLUTIONS)
    }
    if not convolutions:
        return set()
    linear = [path for path, location in locations.items() if isinstance(location.module, nn.Linear)]
    shortcuts = [
        path
        for path, location in convolutions.items()
        if any(fnmatchcase(path, pattern) for pattern in _SHORTCUTS)
        and all(size == 1 for size in location.module.kernel_size)  # type: ignore[union-attr]
    ]
    return {next(iter(convolutions)), *linear[-1:], *shortcuts}


def _check_list(name: str, given: Any, kinds: tuple[type, ...], what: str, example: str) -> None:
    if isinstance(given, (str, type)) or not all(isinstance(one, kinds) for one in given):
        raise ArgumentError(
            f"`Select({name})` must be a list of {what}, but got {name}={given!r}. Write e.g. {example}."
        )
