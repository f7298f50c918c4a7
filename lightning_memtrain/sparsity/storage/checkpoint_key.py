"""The key by which a checkpoint of a sparse model tells how it is loaded, where a dense model refuses it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: The first key of a checkpoint's weights: a model without sparse layers reports keys that it does not know.
CHECKPOINT_KEY = (
    "sparse weights: load them in a Trainer with SparseTraining, and save export_dense(model) for others"
)


def with_checkpoint_key(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with the explaining key before all others.

    Args:
        state_dict: of a model with sparse layers.

    Returns:
        The same tensors, behind an empty one of float32.
    """
    return {CHECKPOINT_KEY: torch.empty(0), **state_dict}


def ignore_checkpoint_key(unexpected_keys: list[str]) -> None:
    """Take the explaining key from those that no module expects.

    For sparse layers, which are loaded after all modules around them.

    Args:
        unexpected_keys: so far.
    """
    if CHECKPOINT_KEY in unexpected_keys:
        unexpected_keys.remove(CHECKPOINT_KEY)
