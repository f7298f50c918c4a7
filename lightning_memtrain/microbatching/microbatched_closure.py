"""The closure that takes the place of Lightning's own: zero_grad, and a batch in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_memtrain.microbatching import training_loop
from lightning_memtrain.microbatching.automatic_size.recovery import Recovery
from lightning_memtrain.microbatching.automatic_size.size_choice import AutoSize
from lightning_memtrain.microbatching.batchnorm.batchnorm_policy import BatchNormPolicy
from lightning_memtrain.microbatching.chunk_runner import ChunkRunner
from lightning_memtrain.microbatching.past_gradients import PastGradients, zero_grad_hooks
from lightning_memtrain.microbatching.splitting.chunks import FixedSplit, Splitter
from lightning_memtrain.microbatching.training_loop import Backward


class MicrobatchedClosure(training_loop.Closure):
    """zero_grad, then forward and backward of one chunk after the other.

    Gradients are zeroed before the forward, not after it as Lightning does, since those of the first chunk
    have to survive the forward of the second; or put aside, for hooks that are called when they are zeroed.

    Args:
        run: zeroes gradients and runs the batch; called with the next three.
        kwargs: arguments of ``training_step`` by name; ``batch`` is the whole batch.
        backward_fn: backward with all hooks; ``None`` to skip it.
        zero_grad_fn: ``None`` while gradients are accumulated.
    """

    def __init__(
        self,
        run: Callable[[Any, Backward, Callable[[], None] | None], training_loop.ClosureResult],
        kwargs: Any,
        backward_fn: Backward,
        zero_grad_fn: Callable[[], None] | None,
    ) -> None:
        super().__init__(step_fn=_never, backward_fn=backward_fn, zero_grad_fn=zero_grad_fn)
        self._run = run
        self._kwargs = kwargs
        self._backward, self._zero_grad = backward_fn, zero_grad_fn

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> training_loop.ClosureResult:
        """Run the batch; an optimizer that evaluates several times calls it several times."""
        result = self._run(self._kwargs, self._backward, self._zero_grad)
        if result.loss is None:
            self.warning_cache.warn(
                "`training_step` returned `None`. If this was on purpose, ignore this warning..."
            )
        return result


def _never() -> training_loop.ClosureResult:
    raise AssertionError("the chunks are run one by one")


class ClosureFactory:
    """Makes the closures of one fit: what zeroes gradients, finds the size and runs chunks meets here.

    Args:
        trainer: the trainer that fits.
        model: its module.
        splitter: splits and weighs.
        size: how many chunks to make.
        batchnorm: what batch normalisation does about chunks.
        sync_each_chunk: whether sharded gradients are reduced in each chunk's backward, or in the last one's.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule,
        splitter: Splitter,
        size: FixedSplit | AutoSize,
        batchnorm: BatchNormPolicy,
        sync_each_chunk: bool = True,
    ) -> None:
        self._trainer = trainer
        self._size = size
        self._runner = ChunkRunner(trainer, model, splitter, batchnorm, sync_each_chunk)
        self._zero_grad_hooks = zero_grad_hooks(trainer, model)
        self._repeats_backward = isinstance(size, AutoSize) or batchnorm.may_synchronize
        self.recovery = Recovery(self._runner, size) if isinstance(size, AutoSize) else None
        """Finds the size and corrects it, if it is not fixed."""

    def make(self, kwargs: Any, optimizer: Any, batch_idx: int) -> MicrobatchedClosure:
        """Make the closure of one batch, as the training loop's ``_make_closure`` does."""
        backward = training_loop.backward_fn(self._trainer, optimizer)
        zero_grad = training_loop.zero_grad_fn(self._trainer, batch_idx, optimizer)
        return MicrobatchedClosure(self.run_zeroed, kwargs, backward, zero_grad)

    def run_zeroed(
        self, kwargs: Any, backward: Backward, zero_grad: Callable[[], None] | None
    ) -> training_loop.ClosureResult:
        """As :meth:`run`, without the gradients of the step before.

        Args:
            kwargs: arguments of ``training_step`` by name.
            backward: backward of a loss; ``None`` to skip it.
            zero_grad: zeroes gradients; ``None`` while they are accumulated.

        Returns:
            Loss and further outputs of the whole batch.
        """
        if zero_grad is None:
            return self.run(kwargs, backward)
        if not self._zero_grad_hooks:
            zero_grad()
            return self.run(kwargs, backward)
        with PastGradients(self._runner.parameters(), zero_grad, self._trainer.strategy) as past:
            # A batch that may be run again is only over when all of it has run.
            return self.run(kwargs, backward if self._repeats_backward else past.before_last(backward))

    def run(self, kwargs: Any, backward: Backward) -> training_loop.ClosureResult:
        """Forward and backward of one batch.

        Args:
            kwargs: arguments of ``training_step`` by name.
            backward: backward of a loss; ``None`` to skip it.

        Returns:
            Loss and further outputs of the whole batch.
        """
        if self.recovery is not None:
            return self.recovery.run(kwargs, backward)
        assert isinstance(self._size, FixedSplit)
        runner, batch = self._runner, kwargs["batch"]
        chunks = runner.chunks(batch, self._size.num_chunks(batch, runner.splitter))
        return runner.commit(runner.run_chunks(kwargs, backward, chunks))
