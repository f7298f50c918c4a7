"""Equal weights and equal patterns on all ranks, while the number of weights of a layer changes.

DistributedDataParallel plans its buckets for parameters that keep their size, so the values of sparse layers
are hidden from it; their gradients are averaged here, in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed, nn

from lightning_memtrain.compat.torch_private import set_params_and_buffers_to_ignore_for_model
from lightning_memtrain.sparsity import sharding
from lightning_memtrain.sparsity.storage.candidate_search import Candidates
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight

_IGNORED = "_ddp_params_and_buffers_to_ignore"
# Odd, from the golden ratio; products wrap around.
_MULTIPLIER = -7046029254386353131


def is_replicated(strategy: Any) -> bool:
    """Whether other ranks hold the same values; those that shards divide are looked after by these."""
    several = strategy is not None and getattr(strategy, "world_size", 1) > 1
    return several and not sharding.divides_parameters(strategy)


def hide_from_ddp(model: nn.Module, weights: Mapping[str, SparseWeight]) -> Callable[[], None]:
    """Let DistributedDataParallel leave values and patterns alone.

    Args:
        model: what it wraps.
        weights: whose values and patterns.

    Returns:
        A function that takes it back.
    """
    before = getattr(model, _IGNORED, None)
    hidden = [
        f"{weight.module_path}.{name}".lstrip(".")
        for weight in weights.values()
        for name in ("values", "sparsity_pattern")
    ]
    ignore: Any = set_params_and_buffers_to_ignore_for_model
    ignore(model, [*(before or ()), *hidden])

    def undo() -> None:
        if before is None:
            delattr(model, _IGNORED)
        else:
            ignore(model, before)

    return undo


def refuse_nothing_left(model: nn.Module, weights: Mapping[str, SparseWeight]) -> None:
    """Refuse a model of which DistributedDataParallel would be given no parameter that is trained.

    Args:
        model: what it wraps.
        weights: that are hidden from it, by layer.

    Raises:
        MisconfigurationException: naming a layer that could stay dense.
    """
    values = {id(weight.values) for weight in weights.values()}
    if all(id(one) in values for one in model.parameters() if one.requires_grad):
        raise MisconfigurationException(
            "`SparseTraining` with ddp needs at least one trained parameter that is not a weight of a sparse "
            "layer, since DistributedDataParallel is given only those and refuses a model without any. Give "
            f"a layer a bias, or keep one dense: Select(dense=[{next(iter(weights))!r}])."
        )


@torch.no_grad()
def broadcast_values(weights: Mapping[str, SparseWeight]) -> None:
    """Take the values of rank 0, as DistributedDataParallel does with parameters that it knows."""
    for weight in weights.values():
        distributed.broadcast(weight.values.data, src=0)


def synchronizes(strategy: Any) -> bool:
    """Whether the backward that has just run averages gradients over ranks."""
    return bool(getattr(strategy.model, "require_backward_grad_sync", True))


@torch.no_grad()
def average_gradients(weights: Mapping[str, SparseWeight]) -> None:
    """Average the gradients of values over ranks, all in one message.

    A layer that had no gradient on any rank is left without; where only some ranks had one, the others count
    as zeros.

    Args:
        weights: in the same order on every rank.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for weight in weights.values():
        if weight.values.requires_grad:
            by_dtype.setdefault(weight.values.dtype, []).append(weight.values)
    for values in by_dtype.values():
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in values]
        had = torch.tensor([p.grad is not None for p in values], dtype=parts[0].dtype)
        flat = torch.cat([*parts, had.to(parts[0].device)])
        # Divided first, as DistributedDataParallel does: in float16 a sum could be infinite.
        flat /= distributed.get_world_size()
        distributed.all_reduce(flat)
        *means, had = torch.split(flat, [p.numel() for p in values] + [len(values)])
        for parameter, mean, share in zip(values, means, had.tolist(), strict=True):
            if share and parameter.grad is None:
                parameter.grad = mean.clone()
            elif share and parameter.grad is not None:
                parameter.grad.copy_(mean)


def average(tensors: Iterable[Tensor]) -> None:
    """Average tensors over ranks, in place.

    Args:
        tensors: floating point; as many, of the same shapes, in the same order, on every rank.
    """
    for tensor in tensors:
        tensor /= distributed.get_world_size()
        distributed.all_reduce(tensor)


def average_candidates(found: Mapping[str, Candidates]) -> dict[str, Candidates]:
    """Candidates of all ranks together, with averaged gradients; the same on every rank.

    A position that is not among the candidates of a rank counts as 0 there.

    Args:
        found: of this rank, the same layers in the same order on every rank.

    Returns:
        The union, by ascending position.
    """
    gathered: list[Any] = [None] * distributed.get_world_size()
    mine = {name: (one.positions.cpu(), one.gradients.cpu()) for name, one in found.items()}
    distributed.all_gather_object(gathered, mine)
    merged = {}
    for name, one in found.items():
        positions, where = torch.unique(torch.cat([rank[name][0] for rank in gathered]), return_inverse=True)
        gradients = torch.zeros(len(positions), dtype=one.gradients.dtype)
        gradients.index_add_(0, where, torch.cat([rank[name][1] for rank in gathered]))
        device = one.positions.device
        merged[name] = Candidates(positions.to(device), (gradients / len(gathered)).to(device))
    return merged


def pattern_fingerprint(positions: Tensor) -> int:
    """A number that two patterns hardly ever share, the same on every machine.

    Args:
        positions: int64 of one axis, ascending.

    Returns:
        A whole number.

    Example:
        >>> pattern_fingerprint(torch.tensor([0, 3])) == pattern_fingerprint(torch.tensor([0, 4]))
        False
    """
    mixed = (positions + 1) * _MULTIPLIER
    return int((mixed ^ (mixed >> 29)).sum()) * 31 + positions.numel()


def refuse_differences(weights: Mapping[str, SparseWeight], step: int) -> None:
    """Compare the patterns of all ranks.

    Args:
        weights: in the same order on every rank.
        step: for the error.

    Raises:
        RuntimeError: naming the layer that differs.
    """
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(
        gathered, {name: pattern_fingerprint(w.positions()) for name, w in weights.items()}
    )
    for rank, theirs in enumerate(gathered):
        for name, number in theirs.items():
            if gathered[0].get(name) != number:
                raise RuntimeError(
                    f"The pattern of {name!r} differs between rank 0 and rank {rank} after the update of "
                    f"step {step}, so their weights have drifted apart. Give every rank the same "
                    "`SparseTraining(seed)`, and let nothing change weights on single ranks, nor step them "
                    "by gradients that were not averaged over ranks (a backward under `no_sync`, say)."
                )
