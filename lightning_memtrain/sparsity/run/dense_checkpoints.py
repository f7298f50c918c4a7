"""What a run leaves: dense weights in model and checkpoints, for code that knows of no sparse layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memtrain.sparsity.storage.patterns import Span, decode, pattern_fault
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight

Leave = Literal["sparse", "dense"]


def with_dense_weights(
    state_dict: Mapping[str, Tensor], weights: Mapping[str, SparseWeight]
) -> dict[str, Tensor]:
    """A model's state with a dense weight in the place of values and pattern, made in host memory.

    Args:
        state_dict: of a model with sparse layers.
        weights: of these.

    Returns:
        The rest is what was given.
    """
    values = {_key(weight, "values"): weight for weight in weights.values()}
    patterns = {_key(weight, "sparsity_pattern") for weight in weights.values()}
    dense: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key in values:
            dense[values[key].name] = values[key].layer.dense().cpu()
        elif key not in patterns:
            dense[key] = value
    return dense


def patterns_of(weights: Mapping[str, SparseWeight]) -> dict[str, tuple[int, Tensor]]:
    """What has to be saved beside dense weights, so that the same entries are stored again.

    Args:
        weights: of sparse layers, by path.

    Returns:
        How many entries are stored, and the pattern (uint8, int16 or int32, of one axis), by path.
    """
    return {path: (weight.nnz, weight.layer.sparsity_pattern.cpu()) for path, weight in weights.items()}


def with_stored_entries(
    state_dict: Mapping[str, Tensor],
    weights: Mapping[str, SparseWeight],
    patterns: Mapping[str, tuple[int, Tensor]],
) -> dict[str, Tensor]:
    """A model's state with values and pattern in the place of dense weights that were saved.

    Args:
        state_dict: with dense weights.
        weights: of the layers that are sparse in the model, by path.
        patterns: of :func:`patterns_of`, when the weights were saved.

    Returns:
        The rest is what was given.

    Raises:
        ValueError: if a pattern is damaged.
    """
    by_name = {weight.name: path for path, weight in weights.items() if path in patterns}
    stored: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key not in by_name:
            stored[key] = value
            continue
        weight, (nnz, pattern) = weights[by_name[key]], patterns[by_name[key]]
        if (complaint := pattern_fault(pattern, torch.empty(nnz), value.shape)) is not None:
            raise ValueError(f"The pattern of {key!r} in the checkpoint {complaint}")
        positions = decode(pattern, value.numel(), Span(0, value.numel(), 0, nnz)).to(value.device)
        stored[_key(weight, "values")] = value.reshape(-1).index_select(0, positions)
        stored[_key(weight, "sparsity_pattern")] = pattern
    return stored


def make_dense(checkpoint: dict[str, Any], weights: Mapping[str, SparseWeight]) -> None:
    """Put dense weights into a checkpoint.

    Args:
        checkpoint: of Lightning.
        weights: of the layers that are sparse in the model, by path.
    """
    checkpoint["state_dict"] = with_dense_weights(checkpoint["state_dict"], weights)


def make_sparse(checkpoint: dict[str, Any], state_key: str, weights: Mapping[str, SparseWeight]) -> None:
    """Put values and patterns into a checkpoint of dense weights, if patterns were saved with it.

    Args:
        checkpoint: of Lightning.
        state_key: of the callback that saved the patterns.
        weights: of the layers that are sparse in the model, by path.
    """
    saved = (checkpoint.get("callbacks") or {}).get(state_key) or {}
    if patterns := saved.get("stored"):
        checkpoint["state_dict"] = with_stored_entries(checkpoint["state_dict"], weights, patterns)


def _key(weight: SparseWeight, what: str) -> str:
    return f"{weight.module_path}.{what}" if weight.module_path else what
