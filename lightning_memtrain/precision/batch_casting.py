"""Batches in the dtype of the weights, except for what they are compared with."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]
from torch import Tensor

from lightning_memtrain.core.arguments.value_checks import check_flags, wrong

_TARGET = re.compile(r"(.*_)?(y|targets?|labels?)", re.IGNORECASE)


def cast_batch(batch: Any, dtype: torch.dtype, cast_targets: bool = False) -> Any:
    """Cast the floating-point tensors of a batch, and leave its targets as they are.

    Targets are the last item of a tuple or list of two or more, unless it is made of numbers and texts, and
    the items of a mapping whose key is ``y``, ``target`` or ``label``, in the plural, too, or ends in one of
    them after an underscore. What stands beside a target is input throughout, but for mappings in it that
    name targets. Where a level has no target, the same holds for each of its items: for the batches of a
    ``CombinedLoader`` that is given a mapping, and for a batch beside its number.

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
    check_flags("cast_batch", cast_targets=cast_targets)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise wrong("cast_batch", "dtype", "a floating-point dtype", dtype, "Use e.g. torch.bfloat16.")
    if cast_targets:
        return _cast_tensors(batch, dtype)
    return _cast_inputs(batch, dtype, beside_target=False)


def _cast_inputs(part: Any, dtype: torch.dtype, beside_target: bool) -> Any:
    targets: set[Any]  # keys or places
    if isinstance(part, Mapping):
        targets = {key for key in part if isinstance(key, str) and _TARGET.fullmatch(key)}
    elif isinstance(part, (tuple, list)):
        has_target = not beside_target and len(part) > 1 and not _is_note(part[-1])
        targets = {len(part) - 1} if has_target else set()
    else:
        return _cast_tensors(part, dtype)
    beside_target = beside_target or bool(targets)

    def converted(key: Any, value: Any) -> Any:
        return value if key in targets else _cast_inputs(value, dtype, beside_target)

    if isinstance(part, Mapping):
        items = OrderedDict((key, converted(key, value)) for key, value in part.items())
        kind: Any = type(part)
        return kind(part.default_factory, items) if isinstance(part, defaultdict) else kind(items)
    parts = [converted(place, value) for place, value in enumerate(part)]
    return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)


def _is_note(part: Any) -> bool:
    """Whether a part of a batch, such as its number or the names of its files, is nothing to compute with."""
    if isinstance(part, (tuple, list)):
        return all(map(_is_note, part))
    return part is None or isinstance(part, (int, float, str, bytes))


def _cast_tensors(part: Any, dtype: torch.dtype) -> Any:
    return apply_to_collection(part, Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x)
