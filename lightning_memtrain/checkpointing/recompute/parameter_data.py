"""Which data parameters have, also while FSDP gives and takes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_memtrain.compat.torch_private import storage_key


class ParameterData(NamedTuple):
    """Which data a parameter has: where in which storage, which may be empty for a while, as under FSDP."""

    storage: torch.UntypedStorage
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, parameter: Any) -> ParameterData | None:
        """The data of a parameter, of any shape and dtype; ``None`` for tensors of other classes."""
        if type(parameter) is not nn.Parameter:
            return None
        return cls(parameter.untyped_storage(), int(parameter.storage_offset()), parameter.dtype)

    def is_that_of(self, parameter: Any) -> bool:
        """Whether a parameter has this data."""
        return bool(
            # As long as it is held, no other one has its number.
            storage_key(self.storage) == storage_key(parameter.untyped_storage())
            and self.offset == parameter.storage_offset()
            and self.dtype is parameter.dtype
        )


def sharded_within(modules: Sequence[nn.Module]) -> set[int]:
    """The modules that FSDP shards apart from the one around them, by ``id``.

    Args:
        modules: a module, and those within it.

    Returns:
        Those of them whose parameters are whole in a call of their own only.
    """
    return {id(inner) for one in modules[1:] if unshards_itself(one) for inner in one.modules()}


def unshards_itself(module: nn.Module) -> bool:
    """Whether FSDP gives a module whole parameters while it runs, and only then.

    Args:
        module: any module.

    Returns:
        Whether it is one of FSDP, of either version.
    """
    return _is_of_fsdp(type(module))  # type: ignore[arg-type]


@cache
def _is_of_fsdp(kind: type[nn.Module]) -> bool:
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in kind.__mro__)
