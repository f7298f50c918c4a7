"""Chunks for which ``training_step`` returned ``None``, as it may to leave a batch out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor

from lightning_memtrain.microbatching.merging.batch_outcome import BatchOutcome, factor_of_the_rest
from lightning_memtrain.microbatching.splitting.chunks import Chunk


class LeftOutChunks:
    """Makes a batch that of the chunks that have a loss, as if the samples of the others were not in it.

    Args:
        trainer: the trainer that fits.
        sum_losses: whether the losses are sums over samples.
    """

    def __init__(self, trainer: Trainer, *, sum_losses: bool) -> None:
        self._trainer = trainer
        self._sum_losses = sum_losses
        self._has_warned = False

    def reweigh(
        self, chunks: Sequence[Chunk], left_out: Sequence[bool], parameters: Iterable[Tensor]
    ) -> float:
        """Let the chunks that have a loss count for those that have none, before the last backward.

        Args:
            chunks: all chunks of the batch.
            left_out: whether each has no loss.
            parameters: those whose gradients are to be weighed, of any shape and dtype.

        Returns:
            The factor by which the loss of the last chunk is to be weighed as well.

        Raises:
            MisconfigurationException: if a callback has taken up the gradients during backward.
        """
        factor = factor_of_the_rest(chunks, left_out)
        if factor == 1.0 or self._sum_losses:
            return 1.0
        _validate(self._trainer, sum(left_out))
        if self._trainer.accumulate_grad_batches > 1:
            return 1.0  # here a whole batch without a loss counts as zero, too
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return factor

    def warn(self, outcome: BatchOutcome) -> None:
        """Say once that chunks were left out of a batch.

        Args:
            outcome: of the batch.
        """
        num_chunks, num_left_out = len(outcome.chunks), outcome.num_left_out
        if self._has_warned or not 0 < num_left_out < num_chunks:
            return
        if outcome.factor == 1.0 and not outcome.sum_losses:
            return  # those without a loss had no weight
        self._has_warned = True
        accumulates = self._trainer.accumulate_grad_batches > 1 and not outcome.sum_losses
        rank_zero_warn(
            f"`training_step` returned `None` for {num_left_out} of {num_chunks} microbatches of a batch, so "
            "its loss, gradients, logs and outputs are those of the other microbatches"
            + (", except that zero is accumulated for the gradients that are missing" if accumulates else "")
            + ". If this was on purpose, ignore this warning."
        )


def _validate(trainer: Trainer, num_left_out: int) -> None:
    """Refuse to leave chunks out where the gradients of the others are taken up already.

    Args:
        trainer: the trainer that fits.
        num_left_out: chunks for which ``training_step`` returned ``None``, not all of the batch.

    Raises:
        MisconfigurationException: if a callback steps during backward.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if getattr(callback, "steps_in_backward", False):
            raise MisconfigurationException(
                f"`Microbatching` beside `{type(callback).__name__}` needs a loss of every microbatch, since "
                "the optimizer has taken up the gradients of some before it is known how much each is to "
                f"count, but got `None` from `training_step` for {num_left_out}. Return a loss of zero that "
                "depends on the parameters, and leave samples out by `weight_fn`."
            )
