"""Batches in the dtype of the weights, except for what they are compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]
from torch import Tensor

_TARGET = re.compile(r"(.*_)?(y|targets?|labels?)", re.IGNORECASE)


def cast_batch(batch: Any, dtype: torch.dtype, cast_targets: bool = False) -> Any:
    """Cast the floating-point tensors of a batch, and leave its targets as they are.

    Targets are the last item of a tuple or list of two or more, and the items of a mapping whose key is
    ``y``, ``target`` or ``label``, in the plural, too, or ends in one of them after an underscore.

    Args:
        batch: any nesting of tensors.
        dtype: what to cast to.
        cast_targets: cast them, too. In float16 a target beyond 65504 becomes infinite.

    Returns:
        The batch, with the tensors that were cast replaced.

    Example:
        >>> images, heights = cast_batch((torch.ones(2, 3), torch.tensor([70000.0, 1.5])), torch.float16)
        >>> images.dtype, heights.tolist()
        (torch.float16, [70000.0, 1.5])
    """

    def cast(part: Any) -> Any:
        return apply_to_collection(part, Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x)

    if cast_targets:
        return cast(batch)
    if isinstance(batch, Mapping):
        converted = cast(batch)  # a mapping of its own
        for key in batch:
            if isinstance(key, str) and _TARGET.fullmatch(key):
                converted[key] = batch[key]
        return converted
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        parts = [*(cast(part) for part in batch[:-1]), batch[-1]]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return cast(batch)
