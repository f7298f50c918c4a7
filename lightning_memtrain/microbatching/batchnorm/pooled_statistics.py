"""Mean and variance of several calls of a batch norm layer, as one call would have seen them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from lightning_memtrain.compat.torch_private import BatchNorm, is_backward_running


class Statistics(NamedTuple):
    """Values per channel, their mean, and their unbiased variance."""

    num_values: int
    mean: Tensor
    variance: Tensor


def add_statistics(pooled: list[Statistics], index: int, seen: Statistics) -> None:
    """Pool what one more call saw with what calls of that place in other chunks did.

    Args:
        pooled: so far, by the place of the call in its chunk; changed in place.
        index: of the call.
        seen: by it; copied, since a layer writes to its buffers.
    """
    if index < len(pooled):
        like = pooled[index].mean
        both = pool_statistics(pooled[index], seen)
        pooled[index] = Statistics(both.num_values, both.mean.to(like), both.variance.to(like))
    else:
        pooled.append(Statistics(seen.num_values, seen.mean.clone(), seen.variance.clone()))


def pool_statistics(one: Statistics, other: Statistics) -> Statistics:
    """Mean and unbiased variance of the values that two saw together.

    Args:
        one: with a mean and a variance of shape ``(channels,)``.
        other: of the same shape, on the same device.

    Returns:
        Both together, in double precision where the device has it.
    """
    dtype = pooling_dtype(one.mean)
    count = one.num_values + other.num_values
    # Few operators, since this is done for each layer of each chunk: what is added is converted on the way.
    mean = one.mean.to(dtype)
    difference = other.mean - mean
    variance = one.variance.to(dtype) * ((one.num_values - 1) / (count - 1))
    variance.add_(other.variance, alpha=(other.num_values - 1) / (count - 1))
    between = one.num_values * other.num_values / count / (count - 1)
    variance.addcmul_(difference, difference, value=between)
    return Statistics(count, torch.add(mean, difference, alpha=other.num_values / count), variance)


def pooling_dtype(like: Tensor) -> torch.dtype:
    """The most precise type that the device of a tensor, of any shape and dtype, computes in."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def num_replicas(module: BatchNorm) -> int:
    """Ranks whose values are in the layer's statistics."""
    if not isinstance(module, nn.SyncBatchNorm):
        return 1
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(module.process_group or distributed.group.WORLD)


# The schema is spelled out because torch < 2.7 cannot read postponed annotations.
@torch.library.custom_op(
    "lightning_memtrain::running_backward", mutates_args=(), schema="(Tensor like) -> Tensor"
)
def running_backward(like: Tensor) -> Tensor:
    """Whether a backward pass is running; for compiled graphs.

    Args:
        like: of any shape and dtype; it only keeps the compiler from folding the answer into a constant.

    Returns:
        A bool tensor without axes, on the CPU.
    """
    return torch.tensor(is_backward_running())


@running_backward.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool)
