"""Which classes hold what may change, and how."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from enum import Enum
from types import MemberDescriptorType, SimpleNamespace

import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing.recompute.objects.content_adapters import (
    ADAPTERS_BY_BASE,
    ADAPTERS_BY_NAME,
    ATTRIBUTES_ADAPTER,
    ContentAdapter,
    SlotsAdapter,
)

# Objects of these packages have threads, files or devices behind them, or are torch's own.
_FOREIGN = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "lightning", "lightning_fabric", "pytorch_lightning"}
    | {"mlflow", "tensorboard", "tensorboardX", "tqdm", "wandb"}
) - {"__main__", "argparse", "collections", "types"}
_HEAP_TYPE = 1 << 9


def _is_cache(cls: type) -> bool:
    """Whether a class is one of the key-value caches of `transformers`; some versions make them modules.

    Args:
        cls: any class.

    Returns:
        Whether it is.
    """
    return any(one.__name__ == "Cache" and one.__module__.startswith("transformers.") for one in cls.__mro__)


def _adapters_of(cls: type) -> tuple[ContentAdapter, ...]:
    """How objects of a class hold others.

    Args:
        cls: any class.

    Returns:
        Its adapters; none for numbers, tensors, modules, functions, and whatever cannot be looked into.
    """
    named = ADAPTERS_BY_NAME.get((str(cls.__module__), cls.__qualname__))
    if named is not None:
        return named
    if cls in (functools.partial, torch.Generator):  # which count as classes of somebody's own
        return ADAPTERS_BY_BASE[cls]
    if issubclass(cls, (Tensor, type, Enum, BaseException)) or hasattr(cls, "__del__"):
        return ()
    if issubclass(cls, nn.Module) and not is_cache(cls):
        return ()
    is_own = {one: bool(one.__flags__ & _HEAP_TYPE) for one in cls.__mro__}
    base = next(one for one in cls.__mro__ if not is_own[one])
    if base not in ADAPTERS_BY_BASE or (is_own[cls] and str(cls.__module__).partition(".")[0] in _FOREIGN):
        return ()
    adapters = ADAPTERS_BY_BASE[base]
    if cls.__dictoffset__ and base is not SimpleNamespace:
        adapters += (ATTRIBUTES_ADAPTER,)
    members = {
        name: member
        for one in cls.__mro__
        for name, member in vars(one).items()
        if is_own[one] and isinstance(member, MemberDescriptorType)
    }
    return (*adapters, SlotsAdapter(members)) if members else adapters


is_cache: Callable[[type], bool] = functools.cache(_is_cache)
"""Whether a class is one of the key-value caches of `transformers`."""
adapters_of: Callable[[type], tuple[ContentAdapter, ...]] = functools.cache(_adapters_of)
"""How objects of a class hold others: in nothing for numbers, tensors, modules, functions, and the like."""
