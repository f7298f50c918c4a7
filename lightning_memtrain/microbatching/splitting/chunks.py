"""Chunks of a batch, and how much each counts in the loss of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.microbatching.splitting.batches import batch_size_of, split_batch

LossReduction = Literal["mean", "sum"]
SplitFn = Callable[[Any, int], Sequence[Any]]
WeightFn = Callable[[Any], "float | torch.Tensor"]


@dataclass(frozen=True)
class Chunk:
    """A part of a batch.

    Args:
        batch: samples in the structure of the whole batch.
        weight: factor of its loss in the loss of the whole batch; 0 for a chunk that does not count.
        num_samples: how many samples it has; ``None`` if only the user's ``split_fn`` knows.
        repeated: whether it is another one once more, run only because other ranks have more chunks.
    """

    batch: Any
    weight: float
    num_samples: int | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Splitter:
    r"""Splits batches, and weighs the chunks so that their losses add up to the loss of the whole batch.

    With a loss that is a mean over samples (or tokens), :math:`L = \sum_i \frac{n_i}{N} L_i` where
    :math:`n_i` is what ``weight_fn`` says of chunk :math:`i`, by default its number of samples, and
    :math:`N = \sum_i n_i`; with a sum, :math:`L = \sum_i L_i`.

    Args:
        loss_reduction: how ``training_step`` reduces its loss over the samples.
        weight_fn: what a chunk's mean was taken over, e.g. its number of valid tokens; not negative.
        split_fn: splits a batch into at most so many chunks.
        owner: what the user has called, for errors.
    """

    loss_reduction: LossReduction = "mean"
    weight_fn: WeightFn | None = None
    split_fn: SplitFn | None = None
    owner: str = "Microbatching"

    def batch_size(self, batch: Any) -> int:
        """How many samples a batch has.

        Args:
            batch: the whole batch.

        Returns:
            The count.

        Raises:
            MisconfigurationException: if the batch does not show it.
        """
        try:
            return batch_size_of(batch)
        except MisconfigurationException as error:
            if self.split_fn is None:
                raise
            raise MisconfigurationException(
                f"`{self.owner}(microbatch_size)` needs to count the samples of a batch, but got one "
                f"that does not show them: {error} With `split_fn`, use `num_microbatches` instead."
            ) from error

    def num_microbatches(self, batch: Any, microbatch_size: int) -> int:
        """How many chunks of at most ``microbatch_size`` samples a batch makes.

        The peak is that of the largest chunk: even sizes (9 as 5 + 4, not 8 + 1) keep it lowest at the same
        number of passes, and leave no chunk with too few samples for batch norm.

        Args:
            batch: the whole batch.
            microbatch_size: most samples of a chunk, at least 1.

        Returns:
            The count, at least 1.
        """
        return max(1, math.ceil(self.batch_size(batch) / microbatch_size))

    def split(self, batch: Any, num_microbatches: int) -> list[Chunk]:
        """Split a batch into weighed chunks.

        Args:
            batch: the whole batch.
            num_microbatches: how many chunks to make; a smaller batch makes fewer.

        Returns:
            The chunks in order. If no chunk weighs anything, all count the same, so that the loss of the
            whole is as undefined as without splitting.

        Raises:
            ArgumentError: if ``batch`` cannot be split, or ``split_fn`` or ``weight_fn`` returns
                what cannot be used.
        """
        if num_microbatches == 1:
            return [Chunk(batch, 1.0, _size_if_known(batch))]
        if self.split_fn is None:
            parts: Sequence[Any] = split_batch(batch, num_microbatches)
            sizes: list[int | None] = [batch_size_of(part) for part in parts]
        else:
            parts = self.split_fn(batch, num_microbatches)
            if not isinstance(parts, Sequence) or not 1 <= len(parts) <= num_microbatches:
                count = f"{len(parts)} chunks" if isinstance(parts, Sequence) else type(parts).__name__
                raise ArgumentError(
                    f"`{self.owner}(split_fn)` must return a list of 1 to {num_microbatches} chunks when "
                    f"it is called with num_microbatches={num_microbatches}, but got {count}. "
                    "Return fewer chunks than asked for, never more."
                )
            sizes = _sizes_if_known(batch, parts)
        weights = self._weights(parts, sizes)
        return [Chunk(*chunk) for chunk in zip(parts, weights, sizes, strict=True)]

    def _weights(self, parts: Sequence[Any], sizes: Sequence[int | None]) -> list[float]:
        if self.loss_reduction == "sum":
            return [1.0] * len(parts)
        if self.weight_fn is not None:
            counts = [_weight(self.weight_fn(part), self.owner) for part in parts]
        elif len(parts) == 1:
            return [1.0]
        else:
            counts = [float(size) for size in sizes if size is not None]
            if len(counts) < len(parts):
                raise ArgumentError(
                    f"`{self.owner}(split_fn)` must split along the first axis of all tensors for samples to "
                    "be counted, but the chunks' first axes do not add up to that of the batch. Give "
                    "`weight_fn`, which says over how many samples or tokens the loss of a chunk is a mean."
                )
        total = math.fsum(counts)
        if total == 0:
            return [1 / len(parts)] * len(parts)
        return [count / total for count in counts]


@dataclass(frozen=True)
class FixedSplit:
    """Always the same number of chunks, or chunks of at most the same size.

    Args:
        num_microbatches: chunks per batch; ``None`` if their size is given.
        microbatch_size: most samples per chunk; ``None`` if their number is given.
    """

    num_microbatches: int | None = None
    microbatch_size: int | None = None

    def num_chunks(self, batch: Any, splitter: Splitter) -> int:
        """How many chunks a batch is to make.

        Args:
            batch: the whole batch.
            splitter: counts its samples, if that is asked.

        Returns:
            The count, at least 1; a smaller batch makes fewer.
        """
        if self.microbatch_size is None:
            return self.num_microbatches or 1
        return splitter.num_microbatches(batch, self.microbatch_size)


def mean_weights(chunks: Sequence[Chunk]) -> list[float]:
    """Weights for what is a mean in every chunk, whether or not the loss is one.

    Args:
        chunks: the chunks of a batch.

    Returns:
        Weights that add up to 1: those of a mean loss, else by number of samples.
    """
    weights = [chunk.weight for chunk in chunks]
    if math.isclose(math.fsum(weights), 1.0, rel_tol=1e-9):
        return weights
    sizes = [chunk.num_samples if chunk.num_samples is not None else 1 for chunk in chunks]
    return [size / max(sum(sizes), 1) for size in sizes]


def _weight(value: Any, owner: str) -> float:
    weight = float(value)
    if not math.isfinite(weight) or weight < 0:
        raise ArgumentError(
            f"`{owner}(weight_fn)` must return a finite number of at least 0, but got {weight}. "
            "Return over how many samples or tokens the chunk's loss is a mean."
        )
    return weight


def _sizes_if_known(batch: Any, parts: Sequence[Any]) -> list[int | None]:
    sizes = [_size_if_known(part) for part in parts]
    whole = _size_if_known(batch)
    # A batch with time first, split along its second axis, has chunks as long as itself.
    if None in sizes or (whole is not None and sum(size or 0 for size in sizes) != whole):
        return [None] * len(sizes)
    return sizes


def _size_if_known(batch: Any) -> int | None:
    try:
        return batch_size_of(batch)
    except MisconfigurationException:
        return None
