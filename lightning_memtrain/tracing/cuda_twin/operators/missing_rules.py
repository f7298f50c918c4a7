"""Operators that torch has no rule for which would tell what they return without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import schema_of, tree_leaves, tree_map

# With zeros on the CPU an operator tells what it returns, as long as nothing large has to be computed.
_MOST_BYTES = 2**28


def writes_only(func: Any) -> bool:
    """Whether an operator makes no tensor of its own, such as a fused optimizer's step.

    Args:
        func: the operator.

    Returns:
        Whether all that it returns, if anything, is what it has written to.
    """
    schema = schema_of(func)
    if schema is None or not schema.is_mutable:
        return False
    return not schema.returns


def forms_from_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns for zeros on the CPU, of which only the form is of interest.

    Args:
        func: the operator.
        args: its arguments, tensors without data among them.
        kwargs: its arguments by name.

    Returns:
        The result, on the CPU; ``None`` if it cannot be told.
    """
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    if sum(one.nbytes for one in tensors) > _MOST_BYTES:
        return None

    def zeros(value: Any) -> Any:
        if isinstance(value, Tensor):
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            return made.zero_()
        return torch.device("cpu") if isinstance(value, torch.device) else value

    try:
        with torch.no_grad():
            return func(*tree_map(zeros, args), **tree_map(zeros, kwargs))
    except Exception:  # a kernel for CUDA alone, or one that does not take zeros
        return None
