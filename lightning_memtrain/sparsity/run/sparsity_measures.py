"""What sparse training says of a run: counts, bytes, and how much of the model was ever in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_memtrain.core import format_bytes
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight


def training_bytes(weight: SparseWeight, optimizers: Iterable[Optimizer]) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer state of one layer.

    Args:
        weight: of the layer.
        optimizers: that may hold state of it.

    Returns:
        As they are, the pattern included; and as they would be if the layer were dense.
    """
    values = weight.values
    states = [
        state
        for optimizer in optimizers
        for state in optimizer.state.get(values, {}).values()
        if isinstance(state, Tensor) and state.numel() == values.numel() > 1
    ]
    per_value_bytes = 2 * values.element_size() + sum(state.element_size() for state in states)
    pattern_bytes = weight.layer.sparsity_pattern.nbytes
    return weight.nnz * per_value_bytes + pattern_bytes, weight.numel * per_value_bytes


def describe_bytes(weights: Mapping[str, SparseWeight], sparse_bytes: int, dense_bytes: int) -> str:
    """One sentence for the memory report.

    Args:
        weights: by layer.
        sparse_bytes: of :func:`training_bytes`, of all.
        dense_bytes: likewise.

    Returns:
        Text.
    """
    return (
        f"weights, gradients and optimizer state of {len(weights)} sparse layers take "
        f"{format_bytes(sparse_bytes)}; dense ones would take {format_bytes(dense_bytes)}"
    )


def count_sparse_and_all(model: nn.Module, weights: Iterable[SparseWeight]) -> tuple[int, int]:
    """How many of a model's parameters are weights of sparse layers.

    Args:
        model: the module that is trained.
        weights: of its sparse layers.

    Returns:
        Entries of their dense weights, and of all parameters as they would be if these were dense.
    """
    values = {id(weight.values): weight.numel for weight in weights}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in values and not is_lazy(p))
    sparse = sum(values.values())
    return sparse, sparse + dense


def describe_sparsity(weights: Mapping[str, SparseWeight], share: float, starts_dense: bool) -> str:
    """How sparse layers are at the start.

    Args:
        weights: by layer.
        share: of all parameters that are weights of these layers.
        starts_dense: whether memory peaks there.

    Returns:
        Text.
    """
    zeros = {name: 1 - weight.nnz / weight.numel for name, weight in weights.items()}
    low, high = min(zeros, key=zeros.__getitem__), max(zeros, key=zeros.__getitem__)
    least, most = f"{zeros[low]:.1%}", f"{zeros[high]:.1%}"
    where = f"from {least} zeros ({low}) to {most} ({high})" if least != most else f"with {least} zeros each"
    dense = "; the peak is that of dense training" if starts_dense else ""
    return f"{len(zeros)} layers with {share:.1%} of all parameters are sparse, {where}{dense}"
