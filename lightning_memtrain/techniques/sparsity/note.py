"""What a checkpoint of a sparse model says to somebody who loads it into the model as it was, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: The first key of a checkpoint's weights: a model without sparse layers reports keys that it does not know.
NOTE = "sparse weights: load them in a Trainer with SparseTraining, and save export_dense(model) for others"


def with_note(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with the note among its keys.

    Args:
        state_dict: of a model with sparse layers.

    Returns:
        The same tensors, behind an empty one.
    """
    return {NOTE: torch.empty(0), **state_dict}


def drop_note(module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """For a model with sparse layers, which knows: to be registered to run before it loads a state.

    Args:
        module: the model.
        state_dict: that it loads.
    """
    state_dict.pop(NOTE, None)
