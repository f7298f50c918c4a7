"""Microbatching without a Trainer: forward and backward of a batch in chunks, in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_memtrain.coordination import annotate, partial_backward
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_functions, check_modules
from lightning_memtrain.microbatching.backward_sync import broadcast_buffers
from lightning_memtrain.microbatching.batch_snapshot import BatchSnapshot
from lightning_memtrain.microbatching.batchnorm.batchnorm_policy import (
    BatchNormMode,
    BatchNormPolicy,
    check_batchnorm,
)
from lightning_memtrain.microbatching.splitting.argument_checks import check_splitting
from lightning_memtrain.microbatching.splitting.chunks import (
    Chunk,
    FixedSplit,
    LossReduction,
    SplitFn,
    Splitter,
    WeightFn,
)

_NAME = "microbatched_backward"
# A compiled model would be compiled anew for other objects in its hooks.
_POLICIES: WeakKeyDictionary[nn.Module, BatchNormPolicy] = WeakKeyDictionary()


def microbatched_backward(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    batch: Any,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    *,
    loss_reduction: LossReduction = "mean",
    weight_fn: WeightFn | None = None,
    split_fn: SplitFn | None = None,
    batchnorm: BatchNormMode = "pooled",
    num_batchnorm_sweeps: int = 2,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:
    r"""Forward and backward of a batch in the memory of a part of it, for a training loop of one's own.

    Takes the place of ``loss_fn(batch).backward()``. Each chunk runs forward and backward before the next
    one, with its loss weighed so that the gradients add up to those of the whole batch,
    :math:`\nabla L = \sum_i \frac{n_i}{N} \nabla L_i` for a mean over :math:`N = \sum_i n_i` samples. They
    are added to the gradients that there are, so zero these before. Exact up to rounding, unless the model
    looks across samples, as for :class:`~lightning_memtrain.Microbatching`, which does the same in a Trainer.

    Under ``DistributedDataParallel`` gradients are averaged in the last backward only. Where forward or
    backward communicates (FSDP2, ``SyncBatchNorm``), all ranks must have equally many chunks.

    Args:
        model: what ``loss_fn`` runs; its batch normalisation is looked after. It may be wrapped in
            ``DistributedDataParallel``.
        loss_fn: of a batch, its loss: a floating-point tensor with one element.
        batch: tensors of any dtype with one first axis, the samples, in any nesting of tuples, dictionaries
            and dataclasses.
        num_microbatches: chunks of the batch, at least 1. A smaller batch makes as many as it has samples.
        microbatch_size: instead, most samples per chunk, at least 1.
        loss_reduction: how ``loss_fn`` reduces its loss over the batch.
        weight_fn: of a chunk, over how many samples or tokens its mean loss is taken. By default its number
            of samples.
        split_fn: of a batch and a number, a list of at most so many chunks. By default all tensors are split
            along their first axis.
        batchnorm: see :class:`~lightning_memtrain.Microbatching`.
        num_batchnorm_sweeps: for ``"synchronized"``, how often all chunks run.
        backward: of the weighed loss of a chunk, e.g. ``lambda loss: scaler.scale(loss).backward()``.

    Returns:
        The loss of the whole batch, with one element, without a graph.

    Raises:
        ArgumentError: if not exactly one of ``num_microbatches`` and ``microbatch_size`` is
            given, an argument is out of its range, the batch cannot be split, or ``loss_fn`` does not return
            one number.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False).double()
        >>> rows = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
        >>> loss_fn = lambda batch: layer(batch).square().mean()
        >>> loss_fn(rows).backward()
        >>> whole, layer.weight.grad = layer.weight.grad, None
        >>> loss = microbatched_backward(layer, loss_fn, rows, num_microbatches=2)
        >>> torch.allclose(layer.weight.grad, whole), torch.allclose(loss, loss_fn(rows))
        (True, True)
    """
    check_modules(_NAME, model=model)
    check_functions(_NAME, loss_fn=loss_fn, backward=backward)
    check_splitting(_NAME, num_microbatches, microbatch_size, loss_reduction, weight_fn, split_fn)
    check_batchnorm(_NAME, batchnorm, num_batchnorm_sweeps)
    splitter = Splitter(loss_reduction, weight_fn, split_fn, owner=_NAME)
    size = FixedSplit(num_microbatches, microbatch_size)
    chunks = splitter.split(batch, size.num_chunks(batch, splitter))
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if len(chunks) > 1:
        broadcast_buffers(model)
    policy = _policy(inner, batchnorm, num_batchnorm_sweeps)
    last = max(index for index, chunk in enumerate(chunks) if chunk.weight > 0)

    def run_chunks(final: bool) -> Tensor:
        total = None
        for index, chunk in enumerate(chunks):
            if len(chunks) > 1:
                annotate(f"microbatch {index + 1} of {len(chunks)}")
            is_last = final and index == last
            with _gradient_sync(model, is_last), partial_backward(not is_last), policy.chunk():
                loss = _run_chunk(loss_fn, chunk, backward)
            if loss is not None:
                total = loss if total is None else total + loss
        assert total is not None
        return total

    def run_whole() -> None:
        annotate("batch statistics")
        loss_fn(batch)

    def save() -> Callable[[], None]:
        parameter = next(inner.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return BatchSnapshot(inner, None, device, policy.running_statistics, batch=batch).restore

    return policy.run(len(chunks), run_chunks, run_whole, save)


def _run_chunk(
    loss_fn: Callable[[Any], Tensor], chunk: Chunk, backward: Callable[[Tensor], object]
) -> Tensor | None:
    """The weighed loss of a chunk, without a graph; ``None`` for one that does not count."""
    loss = loss_fn(chunk.batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(
            f"`{_NAME}(loss_fn)` must return a tensor with one element, the loss, but got {given}. Reduce it "
            "over the batch, by its mean or sum."
        )
    if chunk.weight == 0:
        return None
    # At weight 1 the loss is left alone, so that one chunk is plain torch to the bit.
    weighed = loss if chunk.weight == 1.0 else loss * chunk.weight
    backward(weighed)
    return weighed.detach()


def _gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()


def _policy(model: nn.Module, mode: BatchNormMode, num_sweeps: int) -> BatchNormPolicy:
    policy = _POLICIES.get(model)
    if policy is None or not policy.is_for(model, mode, num_sweeps):
        policy = BatchNormPolicy(model, mode, num_sweeps)
        if model not in policy.layers:  # it would keep itself alive
            _POLICIES[model] = policy
    return policy
