"""Which layers become sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.compat.torch_private import ConvNd
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.module_selectors import (
    Selector,
    as_selectors,
    matches_nothing,
    selects,
)
from lightning_memtrain.core.arguments.value_checks import check_flags, wrong
from lightning_memtrain.sparsity.methods.distributions import check_sparsity
from lightning_memtrain.sparsity.selection.layer_copies import LayerCopies, find_layer_copies
from lightning_memtrain.sparsity.selection.weight_locations import (
    WeightLocation,
    is_linear_or_convolution,
    weight_locations,
)
from lightning_memtrain.sparsity.storage.sparse_weight import sparse_weights

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
    layer, is a layer of its own here, by the name of the parameter. Depthwise convolutions, frozen layers,
    layers within TorchScript and layers whose weight is computed (weight norm and other parametrizations)
    stay dense. In a model with convolutions, so do by default the first convolution, shortcuts (1x1
    convolutions below a module with "shortcut", "downsample" or "skip" in its name) and the last linear
    layer: they hold few weights, which count for much.

    Args:
        types: layers that become sparse, or modules with such layers in them: class names, classes or paths;
            in names, ``*`` stands for any text.
        dense: layers that stay dense, or modules with such layers in them; likewise.
        overrides: fraction of zeros of single layers by path, ``*`` stands for any text.
        dense_ends: whether first convolution, shortcuts and last linear layer of a convolutional network stay
            dense.

    Raises:
        ArgumentError: if an argument is out of its range; at the start of the run, if a name of ``types`` or
            ``dense`` matches nothing. Not all of the default's names have to.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> list(Select().layers(model)), list(Select(dense_ends=False).layers(model))
        (['1'], ['0', '1', '3'])
    """

    types: Sequence[Selector] = DEFAULT_TYPES
    dense: Sequence[Selector] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)
    dense_ends: bool = True

    def __post_init__(self) -> None:
        cure = "Write e.g. ['Linear', 'Conv2d'], or leave it out for linear and convolution layers."
        as_selectors("Select", cure, types=self.types)
        as_selectors("Select", "Write e.g. ['encoder.*', 'head'].", least=0, dense=self.dense)
        check_flags("Select", dense_ends=self.dense_ends)
        if not isinstance(self.overrides, Mapping):
            raise ArgumentError(
                "`Select(overrides)` must map paths of layers to fractions of zeros, but got "
                f"overrides={self.overrides!r}. Write e.g. {{'head': 0.5}}."
            )
        for name, sparsity in self.overrides.items():
            if not isinstance(name, str):
                cure = "Write e.g. {'head': 0.5}."
                raise wrong("Select", "overrides", "fractions by path", self.overrides, cure)
            check_sparsity(sparsity, f"Select(overrides)[{name!r}]")

    def keeps_dense(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter is named as one that stays dense.

        Args:
            model: the module that is trained.
            name: of the parameter.

        Returns:
            ``True`` where ``dense`` names the parameter, its module or one around it.
        """
        return name in _Named(self.dense, modules_by_path(model))

    def unnamed_locations(self, model: nn.Module) -> dict[str, WeightLocation]:
        """Dense layers that are not among those that are named.

        Args:
            model: the module that is trained.

        Returns:
            By path.
        """
        dense = _Named(self.dense, modules_by_path(model))
        return {path: one for path, one in weight_locations(model).items() if one.name not in dense}

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Layers to make sparse.

        Args:
            model: the module that is trained.

        Returns:
            By path, in the order of the model.

        Raises:
            ArgumentError: if a name of ``types`` or ``dense`` matches nothing.
        """
        return {path: location.module for path, location in self.choose(model)[0].items()}

    def choose(self, model: nn.Module) -> tuple[dict[str, WeightLocation], LayerCopies]:
        """Layers to make sparse, and which of them are copies of others.

        Args:
            model: the module that is trained.

        Returns:
            Layers by path, in the order of the model, and the copies, which are chosen as their originals.

        Raises:
            ArgumentError: if a name of ``types`` or ``dense`` matches nothing.
        """
        modules, locations = modules_by_path(model), weight_locations(model)
        self._refuse_unknown(modules, [location.name for location in locations.values()])
        dense, of_a_type = _Named(self.dense, modules), _Named(self.types, modules)
        named = {path for path, location in locations.items() if location.name in dense}
        of_types = {path: location for path, location in locations.items() if location.name in of_a_type}
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

    def _refuse_unknown(self, modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
        """Refuse what names nothing; ``names`` are of the dense weights that can be sparse."""
        model = modules[""]
        # The model itself stands for its own parameters only.
        with_parameters = {
            path: module
            for path, module in modules.items()
            if next(module.parameters(recurse=bool(path)), None) is not None
        }
        _refuse_nothing("Select(dense)", self.dense, with_parameters | dict.fromkeys(names, _NO_MODULE))
        if tuple(self.types) != DEFAULT_TYPES:  # whose names are for models of all kinds
            # Layers that are sparse already may be meant, too: a trainer can fit a model again.
            weights = [*names, *sparse_weights(model)]
            owners = {id(modules[name.rpartition(".")[0]]) for name in weights}
            around = {
                path: module
                for path, module in modules.items()
                if any(id(inner) in owners for inner in (module.modules() if path else (module,)))
            }
            _refuse_nothing("Select(types)", self.types, around | dict.fromkeys(weights, _NO_MODULE))


def has_selectable_layers(model: nn.Module) -> bool:
    """Whether layers to choose from have been made.

    Args:
        model: perhaps before its ``configure_model``.

    Returns:
        ``True`` also if they are sparse already.
    """
    has_layers = any(is_linear_or_convolution(module) for module in model.modules())
    return has_layers or bool(weight_locations(model))


# In the place of a module where there is a parameter, which a name can mean, but no class.
_NO_MODULE = nn.Module()


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model, those in several places by each of their paths.

    Args:
        model: any.

    Returns:
        By path; that of the model is empty.
    """
    return dict(model.named_modules(remove_duplicate=False))


class _Named:
    """Which parameters are meant by selectors: by their name, by their module or by one around it."""

    def __init__(self, selectors: Sequence[Selector], modules: Mapping[str, nn.Module]) -> None:
        self._selectors, self._modules = selectors, modules
        # By identity: a layer in several places may be named by any of them.
        self._meant = {
            id(inner)
            for path, module in modules.items()
            if any(selects(one, path, module) for one in selectors)
            for inner in (module.modules() if path else (module,))
        }

    def __contains__(self, name: str) -> bool:
        return id(self._modules[name.rpartition(".")[0]]) in self._meant or any(
            selects(one, name, _NO_MODULE) for one in self._selectors
        )


def _refuse_nothing(argument: str, selectors: Sequence[Selector], known: Mapping[str, nn.Module]) -> None:
    for selector in selectors:
        if not any(selects(selector, path, module) for path, module in known.items()):
            layers = {path: module for path, module in known.items() if module is not _NO_MODULE}
            raise matches_nothing(argument, selector, layers)


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
