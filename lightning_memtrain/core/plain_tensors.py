"""Tensors whose numbers lie in their own storage, entry by entry."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import FakeTensor


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether something is a tensor of torch's own, or one without data in the place of such a one.

    Other subclasses hold codes, shards or other forms.

    Args:
        value: anything.

    Returns:
        Whether it is one.

    Example:
        >>> import torch
        >>> is_plain(torch.zeros(2)), is_plain([0.0, 0.0])
        (True, False)
    """
    return type(value) in (Tensor, nn.Parameter) or isinstance(value, FakeTensor)


def has_no_data(tensor: Tensor) -> bool:
    """Whether a tensor has a form alone, so that nobody can ask for its numbers.

    Args:
        tensor: any.

    Returns:
        Whether it is on ``meta``, or of a step without data.

    Example:
        >>> import torch
        >>> has_no_data(torch.zeros(2, device="meta"))
        True
    """
    return tensor.is_meta or isinstance(tensor, FakeTensor)
