"""Optimizers whose state in 8 bits cannot be sharded say so when they are made."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_memtrain.core import ArgumentError


def validate_unsharded(name: str, parameters: Iterable[Tensor]) -> None:
    """Refuse parameters that are distributed tensors, as those of FSDP2 are.

    One scale per 256 numbers has no place in the shards of a weight: saved whole, or loaded by another number
    of ranks, it would belong to other numbers.

    Args:
        name: of the optimizer.
        parameters: all of them, of any shapes and dtypes.

    Raises:
        ArgumentError: if one of them is sharded.
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            raise ArgumentError(
                f"`{name}(params)` must be whole tensors, whose state in 8 bits has one scale per block of "
                f"numbers, but got a distributed one (DTensor) of shape {tuple(parameter.shape)}. Under "
                "FSDP2 (`ModelParallelStrategy`) and tensor parallelism use an optimizer of torch, such as "
                "torch.optim.SGD or torch.optim.AdamW, whose state is sharded as the weights are, or train "
                "with `ddp`."
            )
