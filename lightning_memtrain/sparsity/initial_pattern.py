"""The pattern that a model begins with, as a method and a selection say."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.core.arguments.value_checks import check_counts, check_kinds, check_modules
from lightning_memtrain.core.plain_tensors import has_no_data
from lightning_memtrain.sparsity.methods.rules.layer_updates import UpdateTime
from lightning_memtrain.sparsity.methods.rules.random_positions import sample_free_positions
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod, check_method
from lightning_memtrain.sparsity.selection.layer_copies import LayerCopies
from lightning_memtrain.sparsity.selection.layer_validation import refuse_layers
from lightning_memtrain.sparsity.selection.select import DEFAULT_TYPES, Select
from lightning_memtrain.sparsity.storage.patterns import Storage
from lightning_memtrain.sparsity.storage.sparse_weight import sparse_weights
from lightning_memtrain.sparsity.storage.sparsify import sparsify_

# Below that share of what is trained a run is warned that it saves little.
_LITTLE = 0.5
_NONE = torch.empty(0, dtype=torch.int64)


def random_positions(
    model: nn.Module, method: SparseMethod, select: Select | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Draw where a dense model keeps weights, as many in each layer as a method says.

    For :func:`~lightning_memtrain.sparsity.sparsify_`; the model stays as it is. Layers that are copies have
    the positions of their original. Weights of a layer, or of the model, that have so many zeros already lose
    nothing: all that are not 0 stay.

    Args:
        model: dense.
        method: says how many.
        select: says in which layers; by default :class:`Select` without arguments.
        seed: of the positions, which depend on nothing else.

    Returns:
        By the name of the weight, flat positions: int64 of one axis, each once, in any order, on the CPU.
        Layers that keep all of their weights for good are left out.

    Raises:
        MisconfigurationException: if a weight is tied or not yet made.

    Warns:
        NoEffectWarning: if there is no layer to make sparse.

    Example:
        >>> from lightning_memtrain.sparsity import StaticSparse, sparsify_
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> positions = random_positions(model, StaticSparse(0.75))
        >>> {name: len(one) for name, one in positions.items()}
        {'0.weight': 4, '1.weight': 2}
        >>> sparsify_(model, positions)["0.weight"]
        SparseWeight('0.weight', shape=(4, 4), nnz=4)
    """
    check_modules("random_positions", model=model)
    check_method("random_positions", method)
    expected, cure = "a Select or None", "Leave it out for linear and convolution layers."
    check_kinds("random_positions", (Select, type(None)), expected, cure, select=select)
    check_counts("random_positions", None, "Leave it out for 0.", seed=seed)
    return _draw(model, method, select or Select(), seed, "random_positions")[0]


def sparsify_at_random(
    model: nn.Module,
    method: SparseMethod,
    select: Select,
    seed: int,
    storage: Storage = "auto",
    chunk_bytes: int | str | None = None,
) -> LayerCopies:
    """Make a model sparse at :func:`random_positions`, where weights keep their values.

    Args:
        model: becomes sparse in place.
        method: says how many weights each layer keeps.
        select: says in which layers.
        seed: of the positions, which depend on nothing else.
        storage: form of the pattern.
        chunk_bytes: most bytes of a dense weight that a linear layer makes at a time.

    Returns:
        Which layers are copies of which.

    Raises:
        MisconfigurationException: if a weight is tied or not yet made.

    Example:
        >>> from lightning_memtrain.sparsity import StaticSparse
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = sparsify_at_random(model, StaticSparse(0.75), Select(dense=["1"]), seed=0)
        >>> model[0]
        SparseLinear(in_features=4, out_features=4, bias=True, nnz=4, storage='bitmask')
    """
    positions, copies = _draw(model, method, select, seed, "SparseTraining")
    if positions:
        sparsify_(model, positions, storage=storage, chunk_bytes=chunk_bytes)
        if tuple(select.types) == DEFAULT_TYPES and not isinstance(method.sparsity, Mapping):
            _warn_of_little(model, select)
    return copies


def _draw(
    model: nn.Module, method: SparseMethod, select: Select, seed: int, subject: str
) -> tuple[dict[str, Tensor], LayerCopies]:
    layers, copies = select.choose(model)
    refuse_layers(model, layers)
    shapes = {path: location.shape for path, location in layers.items() if path not in copies.originals}
    start = UpdateTime(0, 0, 0, seed)
    counts = method.counts(shapes, select.overrides) if layers else {}
    nonzero = {path: _count_nonzero(layers[path].parameter) for path in counts}
    positions = {}
    for path, count in _with_room(counts, nonzero).items():
        # A layer that keeps all of its weights for good needs no pattern.
        if count < math.prod(shapes[path]) or method.changes_nnz:
            present = _nonzero(layers[path].parameter) if nonzero[path] <= count else _NONE
            numel, missing = math.prod(shapes[path]), count - len(present)
            drawn = sample_free_positions(numel, present, missing, start.generator(path))
            positions[layers[path].name] = torch.cat([present, drawn])
    for copy, original in copies.originals.items():
        if layers[original].name in positions:
            positions[layers[copy].name] = positions[layers[original].name]
    if not positions:
        what = f"leaves all of {', '.join(layers)} dense" if layers else f"matched no layer: {select}"
        warnings.warn(
            f"`{subject}` has no effect: {method} {what}. Raise the sparsity, or choose layers by "
            "Select(types=..., dense_ends=False).",
            NoEffectWarning,
            stacklevel=3,
        )
    return positions, copies


def _count_nonzero(parameter: nn.Parameter) -> int:
    if has_no_data(parameter):  # random numbers are not 0
        return parameter.numel()
    return int(torch.count_nonzero(parameter.detach()))


def _nonzero(parameter: nn.Parameter) -> Tensor:
    if has_no_data(parameter):
        return torch.arange(parameter.numel())
    return parameter.detach().reshape(-1).nonzero().flatten().cpu()


def _with_room(counts: Mapping[str, int], nonzero: Mapping[str, int]) -> dict[str, int]:
    """Counts of the same sum that lose nothing, if the model as a whole has so few weights."""
    if sum(nonzero.values()) > sum(counts.values()):
        return dict(counts)
    lacking = sum(max(0, nonzero[path] - count) for path, count in counts.items())
    roomy = {}
    for path, count in counts.items():
        given = min(lacking, max(0, count - nonzero[path]))
        lacking -= given
        roomy[path] = max(count - given, nonzero[path])
    return roomy


def _warn_of_little(model: nn.Module, select: Select) -> None:
    """Warn if most of what is trained stays dense, and nobody asked for that."""
    weights = sparse_weights(model).values()
    numels = {id(weight.values): weight.numel for weight in weights}
    dense = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in numels
        and not is_lazy(parameter)
        and parameter.requires_grad
        and not select.keeps_dense(model, name)
    }
    sparse = sum(numels.values())
    if (share := sparse / (sparse + sum(dense.values()))) >= _LITTLE:
        return
    largest = sorted(dense, key=dense.__getitem__, reverse=True)[:3]
    named = ", ".join(f"{name!r} ({dense[name]:,})" for name in largest)
    warnings.warn(
        f"`SparseTraining` reaches {sparse:,} of {sparse + sum(dense.values()):,} trained parameters, "
        f"{share:.1%}, so that it saves little. The largest that stay dense are {named}. Choose other layers "
        "by Select(types=..., dense_ends=False), or name these in Select(dense=[...]) if they are meant to.",
        stacklevel=2,
    )
