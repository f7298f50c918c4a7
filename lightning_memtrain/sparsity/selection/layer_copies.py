"""Copies of layers: a teacher that follows its student by averaging has to have the same positions.

A layer whose weight equals another one's when they become sparse is taken for a copy that was made before:
it becomes what a copy of the sparse layer would have been. The blocks of one network, which
``nn.TransformerEncoder`` for instance makes by copying, are equal at first as well; they differ in a number
of their path only, and each is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_memtrain.compat.torch_private import is_traceable_wrapper_subclass
from lightning_memtrain.core.plain_tensors import has_no_data
from lightning_memtrain.sparsity.selection.weight_locations import WeightLocation
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight

_SAMPLE_NUMEL = 32


@dataclass(frozen=True)
class LayerCopies:
    """Layers whose weights were equal when they became sparse.

    Args:
        originals: of each layer that is a copy, the path of its original, by its path.
        equals: paths of layers that are equal, whether copies or blocks of one network.
    """

    originals: Mapping[str, str] = field(default_factory=dict)
    equals: Sequence[Sequence[str]] = ()

    def description(self) -> str:
        """One sentence for the log, that names the first four."""
        named = ", ".join(f"{copy!r} of {original!r}" for copy, original in [*self.originals.items()][:4])
        more = f" and {len(self.originals) - 4} more" if len(self.originals) > 4 else ""
        return f"copies share the pattern of their original: {named}{more}"


def find_layer_copies(locations: Mapping[str, WeightLocation], spared: Collection[str] = ()) -> LayerCopies:
    """Find layers that are copies of others.

    Args:
        locations: weights that can be sparse, by path.
        spared: paths of those that stay dense in any case.

    Returns:
        A frozen layer is a copy of an equal one that is trained; of two that are trained, the second is a
        copy of the first, unless their paths differ in numbers alone.

    Raises:
        MisconfigurationException: if a frozen layer equals several blocks, so that there is no telling which
            one it follows.
    """
    originals: dict[str, str] = {}
    equals = [group for like in _similar_groups(locations) for group in _equal_groups(locations, like)]
    for group in equals:
        trained = [path for path in group if locations[path].parameter.requires_grad]
        for path in group:
            is_trained = path in trained
            earlier = trained[: trained.index(path)] if is_trained else trained
            options = paths_ending_alike(
                path, [o for o in earlier if not is_trained or not _differ_in_numbers(o, path)]
            )
            roots = dict.fromkeys(originals.get(option, option) for option in options)
            if len(roots) == 1:
                originals[path] = next(iter(roots))
            elif len(roots) > 1 and path not in spared and not _is_constant(locations[path].parameter):
                raise MisconfigurationException(
                    f"`SparseTraining` cannot tell which layer the frozen copy {path!r} follows: it equals "
                    f"{', '.join(map(repr, options))}, which have patterns of their own. Add {path!r} to "
                    "Select(dense=[...]), or make the copy after the first training step."
                )
    in_order = {path: originals[path] for path in locations if path in originals}
    return LayerCopies(in_order, equals)


def _similar_groups(locations: Mapping[str, WeightLocation]) -> Iterable[list[str]]:
    """Layers that may be equal by what is seen at a glance."""
    groups: dict[Any, list[str]] = {}
    for path, location in locations.items():
        parameter = location.parameter
        if is_lazy(parameter) or has_no_data(parameter) or not parameter.numel():
            continue
        if is_traceable_wrapper_subclass(parameter):  # a shard, which is refused where it cannot be converted
            continue
        flat = parameter.detach().reshape(-1)
        sample = (*flat[:_SAMPLE_NUMEL].tolist(), *flat[-_SAMPLE_NUMEL:].tolist())
        form = type(location.module), location.attribute, parameter.shape, parameter.dtype, parameter.device
        groups.setdefault((*form, sample), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _equal_groups(locations: Mapping[str, WeightLocation], paths: list[str]) -> Iterable[list[str]]:
    while len(paths) > 1:
        first = locations[paths[0]].parameter
        same = [path for path in paths if torch.equal(locations[path].parameter, first)]
        if len(same) > 1:
            yield same
        paths = [path for path in paths if path not in (paths[0], *same)]


def paths_ending_alike(path: str, others: Iterable[str]) -> list[str]:
    """Of some paths, those that end as another one does, as far as possible.

    Args:
        path: e.g. ``"teacher.layers.1.linear"``.
        others: to choose from.

    Returns:
        Those with the most names at the end in common; several if there is no telling.

    Example:
        >>> paths_ending_alike("teacher.layers.1", ["student.layers.0", "student.layers.1"])
        ['student.layers.1']
    """
    lengths = {other: _common_end(path, other) for other in others}
    return [other for other, length in lengths.items() if length == max(lengths.values())]


def _common_end(path: str, other: str) -> int:
    pairs = zip(reversed(path.split(".")), reversed(other.split(".")), strict=False)
    return next((number for number, (one, two) in enumerate(pairs) if one != two), len(path))


def _differ_in_numbers(path: str, other: str) -> bool:
    """Whether two paths differ in numbers only, as those of the blocks of one network do."""
    one, two = path.split("."), other.split(".")
    return len(one) == len(two) and all(
        a == b or (a.isdigit() and b.isdigit()) for a, b in zip(one, two, strict=True)
    )


def _is_constant(parameter: Tensor) -> bool:
    return bool(parameter.min() == parameter.max())


# ---------------------------------------------------------------------- once they are sparse


@torch.no_grad()
def follow_trained(
    copies: LayerCopies,
    weights: Mapping[str, SparseWeight],
    dense: Mapping[str, WeightLocation],
    held: Collection[int],
) -> None:
    """Give layers that no optimizer has the pattern of the equal one that is trained.

    At the start of a run, when weights are still what they were when the layers became sparse.

    Args:
        copies: of the dense layers.
        weights: of the sparse ones, by path.
        dense: layers that stayed dense, by path, without those that were named to.
        held: by ``id``, the parameters that optimizers have.

    Raises:
        MisconfigurationException: if a layer equals several blocks, so that there is no telling which one, or
            if one that should follow is dense and the other is not.
    """
    parameters = {path: location.parameter for path, location in dense.items()}
    parameters |= {path: weight.values for path, weight in weights.items()}
    for group in copies.equals:
        present = [path for path in group if path in parameters]
        leaders = [path for path in present if id(parameters[path]) in held]
        for path in present if leaders else ():
            options = paths_ending_alike(path, leaders)
            if path in leaders or _agree(path, options, weights):
                continue
            _refuse_several(path, options)
            leader = options[0]
            if path not in weights or leader not in weights or isinstance(weights[path].values.data, DTensor):
                raise MisconfigurationException(
                    f"`SparseTraining` cannot let {path!r} follow {leader!r}, which it equals and which is "
                    "trained while no optimizer has the first: it was not known to be a copy when layers "
                    "became sparse. Call `requires_grad_(False)` on the copy in `__init__`, or add it to "
                    "Select(dense=[...])."
                )
            weights[path].layer.set_values(weights[leader].values.detach().clone())
            weights[path].layer.set_positions(weights[leader].positions())


def _agree(path: str, options: Sequence[str], weights: Mapping[str, SparseWeight]) -> bool:
    """Whether a layer is as one of those that it may follow, sparse or dense."""
    if path not in weights:
        return any(option not in weights for option in options)
    return any(option in weights and _share_pattern(weights[path], weights[option]) for option in options)


def followers(
    weights: Mapping[str, SparseWeight],
    trained: Collection[str],
    copies: LayerCopies,
    known: Collection[str],
) -> dict[str, list[SparseWeight]]:
    """Layers that are not trained and have the pattern of one that is: they keep it when that one moves.

    Args:
        weights: of all sparse layers, by path.
        trained: paths of those that an optimizer has given a step.
        copies: of the dense layers.
        known: paths of those that were sparse at the start. Others are copies that were made since.

    Returns:
        By the path of the layer that they follow.

    Raises:
        MisconfigurationException: if one has the pattern of several, which are about to move apart.
    """
    found: dict[str, list[SparseWeight]] = {}
    for path, weight in weights.items():
        if path in trained:
            continue
        # That two layers store everything says nothing.
        equals: set[str] = {one for group in copies.equals if path in group for one in group}
        alike = [
            other
            for other in weights
            if other in trained
            and (weight.nnz < weight.numel or path not in known or other in equals)
            and _share_pattern(weight, weights[other])
        ]
        options = paths_ending_alike(path, alike)
        if options:
            _refuse_several(path, options)
            found.setdefault(options[0], []).append(weight)
    return found


def _share_pattern(one: SparseWeight, other: SparseWeight) -> bool:
    # Equal patterns of one form are equal bytes.
    mine, theirs = one.layer.sparsity_pattern, other.layer.sparsity_pattern
    if one.shape != other.shape or one.nnz != other.nnz:
        return False
    if mine.dtype == theirs.dtype:
        return torch.equal(mine, theirs.to(mine.device))
    return torch.equal(one.positions(), other.positions().to(mine.device))


def _refuse_several(path: str, options: Sequence[str]) -> None:
    if len(options) > 1:
        raise MisconfigurationException(
            f"`SparseTraining` cannot tell which layer the copy {path!r} follows: it equals "
            f"{', '.join(map(repr, options))}, whose weights move apart. Add {path!r} to "
            "Select(dense=[...]), let those start from weights of their own, or use StaticSparse."
        )
