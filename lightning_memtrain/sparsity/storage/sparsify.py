"""Making layers of a model sparse, and dense again, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import is_traceable_wrapper_subclass
from lightning_memtrain.core import ArgumentError, parse_bytes
from lightning_memtrain.core.arguments.value_checks import check_modules, check_optimizers, wrong
from lightning_memtrain.sparsity.storage.layers.layer_types import SPARSE_TYPES
from lightning_memtrain.sparsity.storage.layers.sparse_layer import SparseLayer
from lightning_memtrain.sparsity.storage.layers.sparse_parameters import (
    SparseParameter,
    SparseParameterOwner,
    can_be_sparse,
    densify_parameter,
    sparsify_parameter,
)
from lightning_memtrain.sparsity.storage.patterns import Storage, resolve_storage
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight, check_positions, sparse_weights

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@torch.no_grad()
def sparsify_(
    module: nn.Module,
    positions: Mapping[str, Tensor],
    *,
    storage: Storage = "auto",
    chunk_bytes: int | str | None = None,
) -> dict[str, SparseWeight]:
    """Store only some entries of weights, in place.

    These are the weights of linear and convolution layers, transposed ones included, and of recurrent layers,
    and parameters of three axes: one matrix for each expert of a mixture.

    A layer becomes sparse by changing its class: it stays the same object, with its hooks, bias and name.
    Its parameter ``weight`` gives way to ``values``, of one axis, and a buffer ``sparsity_pattern``; of other
    modules, a parameter gives way to a submodule with these, ``"<its name>_sparse"``. So do this before the
    optimizer is made, and load dense checkpoints first. Weights, gradients and the state of elementwise
    optimizers then take the memory of what is stored. A dense weight and its dense gradient exist while the
    layer's own forward or backward runs; those of a recurrent layer from its forward to its backward.

    Args:
        module: a model, or one layer.
        positions: for the name of each weight to be sparse, as in ``module.named_parameters()``, the flat
            positions that are stored: integers of any order, without repetition. Values are taken from the
            weight as it is; all other entries are 0 from now on.
        storage: form of the pattern: ``"bitmask"`` (a bit per entry of the dense weight), ``"int32"``
            (4 bytes per stored entry, the fastest), ``"block16"`` (2), or ``"auto"`` for the fewest bytes.
        chunk_bytes: most bytes that linear layers make of their dense weight, or of its gradient, at a time,
            e.g. ``"1MiB"`` (but at least 8 rows); ``None`` for the whole. Small chunks take more time, and
            sums are made in another order.

    Returns:
        The weights of ``positions``, in the order of the modules.

    Raises:
        ArgumentError: if a name, its positions or another argument is wrong, or a weight is tied, computed
            from other parameters, not yet made, distributed or sparse already, or of a layer that has no
            sparse form. Nothing has changed then.

    Example:
        >>> layer = nn.Linear(1000, 100)
        >>> weights = sparsify_(layer, {"weight": torch.arange(0, 100_000, 10)})
        >>> layer
        SparseLinear(in_features=1000, out_features=100, bias=True, nnz=10000, storage='bitmask')
        >>> [(name, parameter.shape) for name, parameter in layer.named_parameters()]
        [('bias', torch.Size([100])), ('values', torch.Size([10000]))]
    """
    check_modules("sparsify_", module=module)
    items = positions.items() if isinstance(positions, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(chosen, Tensor) for name, chosen in items):
        cure = "Write e.g. {'0.weight': torch.arange(10)}."
        raise wrong("sparsify_", "positions", "positions by the name of a weight", positions, cure)
    resolve_storage(storage, 0, 0)
    if chunk_bytes is not None:
        chunk_bytes = parse_bytes(chunk_bytes, argument="sparsify_(chunk_bytes)")
    found = {name: _layer_to_change(module, name) for name in positions}
    _refuse_tied(module, found)
    ascending = {
        name: _ascending(f"`sparsify_(positions)` of {name!r}", chosen, _dense(found[name], name).numel())
        for name, chosen in positions.items()
    }
    for name, layer in found.items():
        attribute = name.rpartition(".")[2]
        if can_be_sparse(layer, attribute):
            sparsify_parameter(layer, attribute, ascending[name], storage)
            continue
        dense, dense_type = _dense(layer, name), type(layer)
        del layer._parameters["weight"]
        layer.__class__ = SPARSE_TYPES[dense_type]
        sparse = cast(SparseLayer, layer)
        sparse.dense_type = dense_type
        sparse.storage = storage
        sparse.chunk_bytes = chunk_bytes if isinstance(layer, nn.Linear) else None
        sparse.become_sparse(dense, ascending[name])
    return {name: weight for name, weight in sparse_weights(module).items() if name in positions}


@torch.no_grad()
def densify_(module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
    """Give all sparse layers a dense weight again, in place: the inverse of :func:`sparsify_`.

    Layers have their own classes back, and nothing of a sparse layer is left. Zeros stay where nothing is
    stored, until somebody trains them. Dense weights are made one after the other; what was stored is let go.

    Args:
        module: a model, or one layer.
        optimizers: whose parameter groups are given the dense weights; their state of the stored entries is
            dropped, and begins anew if they go on.

    Raises:
        ArgumentError: if values are divided among ranks. Nothing has changed then.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> _ = sparsify_(layer, {"weight": torch.tensor([0, 3])})
        >>> densify_(layer)
        >>> layer, layer.weight
        (Linear(in_features=2, out_features=2, bias=False), Parameter containing:
        tensor([[1., 0.],
                [0., 1.]], requires_grad=True))
    """
    check_modules("densify_", module=module)
    check_optimizers("densify_", optimizers=optimizers)
    weights = sparse_weights(module)
    for name, weight in weights.items():
        if isinstance(weight.values.data, DTensor):
            raise ArgumentError(
                f"`densify_` needs whole values, but those of {name!r} are divided among ranks. Load "
                "`export_dense(model)` into a model without sparse layers."
            )
    for name, weight in weights.items():
        values, layer = weight.values, weight.layer
        if isinstance(layer, SparseParameter):
            path, _, attribute = name.rpartition(".")
            dense = densify_parameter(cast(SparseParameterOwner, module.get_submodule(path)), attribute)
        else:
            dense = layer.become_dense()
        for optimizer in optimizers:
            optimizer.state.pop(values, None)
            for group in optimizer.param_groups:
                group["params"] = [dense if one is values else one for one in group["params"]]


def _layer_to_change(module: nn.Module, name: str) -> nn.Module:
    path, _, attribute = name.rpartition(".")
    layer: nn.Module | None
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        layer = None
    weight = None if layer is None else layer._parameters.get(attribute)
    subject = f"`sparsify_(positions)` names {name!r}, but "
    is_sparse = isinstance(layer, SparseParameterOwner) and attribute in layer.sparse_names
    if is_sparse or (isinstance(layer, SparseLayer) and attribute in ("weight", "values")):
        raise ArgumentError(
            f"{subject}this weight is sparse already. Use `SparseWeight.replace` to move entries."
        )
    if weight is None and layer is not None and _is_computed(layer, attribute):
        raise ArgumentError(
            f"{subject}this weight is computed from other parameters (weight norm, spectral norm, pruning or "
            "another parametrization), which would stay dense. Remove the parametrization, or leave it out."
        )
    if layer is None or weight is None:
        known = [key for key, _ in module.named_parameters()]
        raise ArgumentError(
            f"{subject}there is no such parameter in {type(module).__name__}. It has "
            f"{', '.join(map(repr, known[:8]))}{' ...' if len(known) > 8 else ''}."
        )
    if is_lazy(weight):
        raise ArgumentError(f"{subject}this lazy layer has no weight yet. Run the model on one batch before.")
    if is_traceable_wrapper_subclass(weight.data):
        raise ArgumentError(
            f"{subject}this weight is a {type(weight.data).__name__}. Make it sparse before it is sharded or "
            "quantised."
        )
    has_form = attribute == "weight" and type(layer) in SPARSE_TYPES
    if not has_form and not can_be_sparse(layer, attribute):
        own = next((base.__name__ for base in SPARSE_TYPES if isinstance(layer, base)), None)
        reason = (
            f"{type(layer).__name__} is a subclass of {own}, whose own forward would not know sparse values"
            if own is not None and attribute == "weight"
            else f"{attribute!r} of {type(layer).__name__} has no sparse form"
        )
        can = ", ".join(base.__name__ for base in SPARSE_TYPES)
        raise ArgumentError(
            f"{subject}{reason}. Leave it out: only weights of {can} and of recurrent layers, and parameters "
            "of three axes such as those of experts, can be sparse."
        )
    if not weight.is_floating_point():
        raise ArgumentError(f"{subject}it is {weight.dtype}, where floating-point numbers were expected.")
    if weight.numel() >= 2**31:
        raise ArgumentError(
            f"{subject}it has {weight.numel()} entries, where fewer than 2**31 were expected."
        )
    return layer


def _dense(layer: nn.Module, name: str) -> nn.Parameter:
    return cast(nn.Parameter, layer._parameters[name.rpartition(".")[2]])


def _is_computed(layer: nn.Module, attribute: str) -> bool:
    old = (f"{attribute}_orig", f"{attribute}_g", f"{attribute}_v")
    return is_parametrized(layer, attribute) or any(key in layer._parameters for key in old)


def _refuse_tied(module: nn.Module, found: Mapping[str, nn.Module]) -> None:
    """One parameter of two layers would become two, and one layer has one name."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in found.items():
        for other in names[id(_dense(layer, name))]:
            path, _, attribute = other.rpartition(".")
            if module.get_submodule(path) is not layer or attribute != name.rpartition(".")[2]:
                raise ArgumentError(
                    f"`sparsify_(positions)` names {name!r}, but this weight is tied to {other!r} and would "
                    "no longer be. Leave it out, or give each its own."
                )
        if (first := names[id(_dense(layer, name))][0]) != name:
            raise ArgumentError(
                f"`sparsify_(positions)` names {name!r}, but the layer's first name is {first!r}. Use that."
            )


def _ascending(subject: str, positions: Tensor, numel: int) -> Tensor:
    if positions.dim() == 1 and positions.dtype in _INTEGERS:
        positions = positions.long().sort().values
    check_positions(subject, positions, numel)
    return positions
