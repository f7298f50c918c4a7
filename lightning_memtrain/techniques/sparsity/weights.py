"""Sparse layers, seen as weights to choose and to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_memtrain.techniques.sparsity import sharding
from lightning_memtrain.techniques.sparsity.candidates import Candidates, CandidateWatch, watch_candidates
from lightning_memtrain.techniques.sparsity.export import export_dense
from lightning_memtrain.techniques.sparsity.layer_types import SPARSE_TYPES
from lightning_memtrain.techniques.sparsity.layers import SparseLayer
from lightning_memtrain.techniques.sparsity.parameters import (
    SUFFIX,
    SparseOwner,
    SparseParameter,
    can_be_sparse,
    sparsify_parameter,
)
from lightning_memtrain.techniques.sparsity.patterns import Storage, choose_storage
from lightning_memtrain.techniques.sparsity.state import check_state, moved, moved_state

# All that whoever moves entries needs to know of how they are stored.
__all__ = [
    "CandidateWatch",
    "Candidates",
    "SparseWeight",
    "Storage",
    "export_dense",
    "sparse_weights",
    "sparsify_",
    "watch_candidates",
]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class SparseWeight:
    """The weight of one sparse layer: which entries are stored, and how others take their place.

    Args:
        name: of the dense weight in its model, e.g. ``"blocks.3.conv1.weight"``.
        layer: that holds it.
    """

    def __init__(self, name: str, layer: SparseLayer) -> None:
        self.name = name
        self.layer = layer

    def __repr__(self) -> str:
        return f"SparseWeight({self.name!r}, shape={tuple(self.shape)}, nnz={self.nnz})"

    @property
    def path(self) -> str:
        """Of the layer, or the name of a parameter of another module."""
        if isinstance(self.layer, SparseParameter):
            return self.name
        return self.name.removesuffix("weight").removesuffix(".")

    @property
    def place(self) -> str:
        """Path of the module that holds the values."""
        return f"{self.name}{SUFFIX}" if isinstance(self.layer, SparseParameter) else self.path

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        return self.layer.dense_shape

    @property
    def numel(self) -> int:
        """Entries of the dense weight."""
        return self.shape.numel()

    @property
    def nnz(self) -> int:
        """Entries that are stored; some of their values may be 0."""
        return self.values.numel()

    @property
    def values(self) -> nn.Parameter:
        """What is stored, of shape ``(nnz,)``, by ascending flat position. The same object for life.

        After ``fully_shard``, a ``DTensor`` outside of forward and backward.
        """
        return self.layer.values

    def positions(self) -> Tensor:
        """Int64 flat positions of the values, ascending, on their device."""
        return self.layer.positions()

    @torch.no_grad()
    def replace(self, kept: Tensor, grown: Tensor, optimizers: Sequence[Optimizer] = ()) -> None:
        """Drop some entries and grow others, optimizer state and gradient included.

        What stays keeps its value, gradient and state. What is new starts at 0, with momentum 0 and with the
        mean of the layer for what scales its step: see
        :func:`~lightning_memtrain.techniques.sparsity.state.moved_state`. The parameter stays the same
        object. All of it changes or nothing: an error (out of memory, say) leaves everything as it was.

        Of values that ``fully_shard`` divided among ranks, all ranks have to call this with the same
        arguments; each has all values of this layer while it runs.

        Args:
            kept: bool ``(nnz,)``: which of the present entries stay.
            grown: int64 flat positions of new entries, ascending, none of them kept. One that is dropped in
                the same call starts anew.
            optimizers: all that may hold state of the values.

        Raises:
            ValueError: if ``kept`` or ``grown`` is no such choice.
            TypeError: if an optimizer's state cannot follow, or the values are no plain tensor, or divided
                among ranks and would become more or fewer. Nothing has changed then.
        """
        values, device = self.values, self.values.device
        is_sharded = isinstance(values.data, DTensor)
        if is_traceable_wrapper_subclass(values.data) and not is_sharded:
            raise TypeError(
                f"`SparseWeight.replace` needs the values of {self.name!r} as a plain tensor or divided by "
                f"`fully_shard`, but they are a {type(values.data).__name__}. Use a method that moves none."
            )
        if kept.dtype != torch.bool or kept.shape != values.shape:
            raise ValueError(
                f"`SparseWeight.replace(kept)` must be bool of shape {tuple(values.shape)}, one per entry of "
                f"{self.name!r}, but got {kept.dtype} of shape {tuple(kept.shape)}."
            )
        _check_positions(f"`SparseWeight.replace(grown)` of {self.name!r}", grown, self.numel)
        kept = kept.to(device)
        staying = kept.nonzero().view(-1)
        positions = torch.cat([self.positions()[staying], grown.to(device)])
        positions, order = positions.sort()
        if not bool((positions.diff() > 0).all()):
            raise ValueError(
                f"`SparseWeight.replace(grown)` of {self.name!r} must hold positions, ascending and none of "
                "them kept, but some come twice. Leave them out, or drop them from `kept`."
            )
        if is_sharded and len(positions) != len(kept):
            raise TypeError(
                f"`SparseWeight.replace` must keep the number of values of {self.name!r}, which are divided "
                f"among ranks in shards of fixed size, but got {len(positions)} for {len(kept)}. Grow as "
                "many as are dropped."
            )
        check_state(optimizers, values)
        source = torch.cat([staying, staying.new_full((len(grown),), -1)])[order]
        # All that is new exists before anything changes.
        exchange = moved_state(optimizers, values, source)
        gradient = values.grad
        if isinstance(values.data, DTensor):
            for divided in (values.data, gradient):
                if isinstance(divided, DTensor):
                    exchange.append(sharding.written(divided, moved(sharding.whole(divided), source)))
        else:
            new_gradient = None if gradient is None else moved(gradient, source)
            exchange.append(self.layer.with_values(moved(values.detach(), source), new_gradient))
        exchange.append(self.layer.with_positions(positions))
        _carry_out(exchange)


def _carry_out(exchange: Sequence[Callable[[], None]]) -> None:
    """Change everything, even if an interrupt comes in between: half a change would mix weights."""
    try:
        for assign in exchange:
            assign()
    except BaseException:
        for assign in exchange:
            assign()
        raise


def sparse_weights(module: nn.Module) -> dict[str, SparseWeight]:
    """The weights of all sparse layers.

    Args:
        module: a model.

    Returns:
        By the name of the dense weight, in the order of the modules.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
        >>> _ = sparsify_(model, {"0.weight": torch.tensor([1, 6])})
        >>> sparse_weights(model)
        {'0.weight': SparseWeight('0.weight', shape=(2, 4), nnz=2)}
    """
    return {
        (name := layer.dense_key(f"{path}." if path else "")): SparseWeight(name, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, SparseLayer)
    }


@torch.no_grad()
def sparsify_(
    module: nn.Module,
    positions: Mapping[str, Tensor],
    *,
    storage: Storage = "auto",
    chunk_bytes: int | None = None,
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
        chunk_bytes: most bytes that linear layers make of their dense weight, or of its gradient, at a time
            (but at least 8 rows); ``None`` for the whole. Small chunks take more time, and sums are made in
            another order.

    Returns:
        The weights of ``positions``, in the order of the modules.

    Raises:
        ValueError: if a name, its positions or another argument is wrong, or a weight is tied, computed from
            other parameters, not yet made, distributed or sparse already. Nothing has changed then.
        TypeError: if a weight is of a layer that has no sparse form. Nothing has changed then.

    Example:
        >>> layer = nn.Linear(1000, 100)
        >>> weights = sparsify_(layer, {"weight": torch.arange(0, 100_000, 10)})
        >>> layer
        SparseLinear(in_features=1000, out_features=100, bias=True, nnz=10000, storage='bitmask')
        >>> [(name, parameter.shape) for name, parameter in layer.named_parameters()]
        [('bias', torch.Size([100])), ('values', torch.Size([10000]))]
    """
    choose_storage(storage, 0, 0)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(
            f"`sparsify_(chunk_bytes)` must be at least 1, but got chunk_bytes={chunk_bytes}. "
            "Use None to make each weight as a whole."
        )
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
        dense = _dense(layer, name)
        del layer._parameters["weight"]
        layer.__class__ = SPARSE_TYPES[type(layer)]
        sparse = cast(SparseLayer, layer)
        sparse.storage = storage
        sparse.chunk_bytes = chunk_bytes if isinstance(layer, nn.Linear) else None
        sparse.become_sparse(dense, ascending[name])
    return {name: weight for name, weight in sparse_weights(module).items() if name in positions}


def _layer_to_change(module: nn.Module, name: str) -> nn.Module:
    path, _, attribute = name.rpartition(".")
    layer: nn.Module | None
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        layer = None
    weight = None if layer is None else layer._parameters.get(attribute)
    subject = f"`sparsify_(positions)` names {name!r}, but "
    is_sparse = isinstance(layer, SparseOwner) and attribute in layer.sparse_names
    if is_sparse or (isinstance(layer, SparseLayer) and attribute in ("weight", "values")):
        raise ValueError(
            f"{subject}this weight is sparse already. Use `SparseWeight.replace` to move entries."
        )
    if weight is None and layer is not None and _is_computed(layer, attribute):
        raise ValueError(
            f"{subject}this weight is computed from other parameters (weight norm, spectral norm, pruning or "
            "another parametrization), which would stay dense. Remove the parametrization, or leave it out."
        )
    if layer is None or weight is None:
        known = [key for key, _ in module.named_parameters()]
        raise ValueError(
            f"{subject}there is no such parameter in {type(module).__name__}. It has "
            f"{', '.join(map(repr, known[:8]))}{' ...' if len(known) > 8 else ''}."
        )
    if is_lazy(weight):
        raise ValueError(f"{subject}this lazy layer has no weight yet. Run the model on one batch before.")
    if is_traceable_wrapper_subclass(weight.data):
        raise ValueError(
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
        raise TypeError(
            f"{subject}{reason}. Leave it out: only weights of {can} and of recurrent layers, and parameters "
            "of three axes such as those of experts, can be sparse."
        )
    if not weight.is_floating_point():
        raise TypeError(f"{subject}it is {weight.dtype}, where floating-point numbers were expected.")
    if weight.numel() >= 2**31:
        raise ValueError(f"{subject}it has {weight.numel()} entries, where fewer than 2**31 were expected.")
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
                raise ValueError(
                    f"`sparsify_(positions)` names {name!r}, but this weight is tied to {other!r} and would "
                    "no longer be. Leave it out, or give each its own."
                )
        if (first := names[id(_dense(layer, name))][0]) != name:
            raise ValueError(
                f"`sparsify_(positions)` names {name!r}, but the layer's first name is {first!r}. Use that."
            )


def _ascending(subject: str, positions: Tensor, numel: int) -> Tensor:
    if positions.dim() == 1 and positions.dtype in _INTEGERS:
        positions = positions.long().sort().values
    _check_positions(subject, positions, numel)
    return positions


def _check_positions(subject: str, positions: Tensor, numel: int) -> None:
    if positions.dim() != 1 or positions.dtype != torch.int64:
        raise ValueError(
            f"{subject} must be flat positions, integers of one axis, but got {positions.dtype} of shape "
            f"{tuple(positions.shape)}. Use `mask.flatten().nonzero().flatten()` for a mask."
        )
    if positions.is_meta or not len(positions):
        return
    if int(positions.min()) < 0 or int(positions.max()) >= numel:
        raise ValueError(
            f"{subject} must be from 0 to {numel - 1}, but got {int(positions.min())} to "
            f"{int(positions.max())}. Count positions in the flattened weight."
        )
    if not bool((positions.diff() > 0).all()):
        raise ValueError(
            f"{subject} must be ascending, each position once, but got a repetition or a descent."
        )
