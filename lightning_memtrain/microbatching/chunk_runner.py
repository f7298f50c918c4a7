"""One batch as several chunks: the closure that takes the place of Lightning's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor

from lightning_memtrain.coordination import annotate, partial_backward
from lightning_memtrain.microbatching import backward_sync, training_loop
from lightning_memtrain.microbatching.automatic_size import size_choice
from lightning_memtrain.microbatching.automatic_size.recovery import Recovery
from lightning_memtrain.microbatching.batch_snapshot import BatchSnapshot
from lightning_memtrain.microbatching.batchnorm.batchnorm_policy import BatchNormPolicy
from lightning_memtrain.microbatching.carried_state import CarriedState
from lightning_memtrain.microbatching.merging.batch_metrics import BatchMetrics
from lightning_memtrain.microbatching.merging.batch_outcome import BatchOutcome, factor_of_the_rest
from lightning_memtrain.microbatching.merging.chunk_logs import CallRecorder
from lightning_memtrain.microbatching.past_gradients import PastGradients, zero_grad_hooks
from lightning_memtrain.microbatching.run_validation import refuse_left_out
from lightning_memtrain.microbatching.splitting.chunks import Chunk, Splitter

Backward = Callable[[Tensor], None] | None


class ChunkResult(NamedTuple):
    """What a chunk leaves behind until its batch is over.

    Args:
        loss: its loss, not yet weighed.
        extra: what else ``training_step`` returned.
        logged: what it logged.
        metrics: what it gave to metrics.
    """

    loss: Tensor | None
    extra: dict[str, Any]
    logged: list[Any]
    metrics: list[Tensor]


class MicrobatchedClosure(training_loop.Closure):
    """zero_grad, then forward and backward of one chunk after the other.

    Gradients are zeroed before the forward, not after it as Lightning does, since those of the first chunk
    have to survive the forward of the second; or put aside, for hooks that are called when they are zeroed.

    Args:
        engine: runs the chunks.
        kwargs: arguments of ``training_step`` by name; ``batch`` is the whole batch.
        backward_fn: backward with all hooks; ``None`` to skip it.
        zero_grad_fn: ``None`` while gradients are accumulated.
    """

    def __init__(
        self,
        engine: MicrobatchEngine,
        kwargs: Any,
        backward_fn: Backward,
        zero_grad_fn: Callable[[], None] | None,
    ) -> None:
        super().__init__(step_fn=_never, backward_fn=backward_fn, zero_grad_fn=zero_grad_fn)
        self._engine = engine
        self._kwargs = kwargs

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> training_loop.ClosureResult:
        """Run the batch; an optimizer that evaluates several times calls it several times."""
        result = self._engine.run_zeroed(self._kwargs, self._backward_fn, self._zero_grad_fn)
        if result.loss is None:
            self.warning_cache.warn(
                "`training_step` returned `None`. If this was on purpose, ignore this warning..."
            )
        return result


def _never() -> training_loop.ClosureResult:
    raise AssertionError("the chunks are run by the engine")


class MicrobatchEngine:
    """Runs batches as chunks for one trainer.

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
        size: size_choice.FixedSplit | size_choice.AutoSize,
        batchnorm: BatchNormPolicy,
        sync_each_chunk: bool = True,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.splitter = splitter
        self._size = size
        self._batchnorm = batchnorm
        self._metrics = BatchMetrics(model)
        self._said_left_out, self._waits = False, not sync_each_chunk
        self._carried = CarriedState(model)
        self._zero_grad_hooks = zero_grad_hooks(trainer, model)
        self._repeats_backward = isinstance(size, size_choice.AutoSize) or batchnorm.may_synchronize
        self.recovery = Recovery(self, size) if isinstance(size, size_choice.AutoSize) else None
        """Finds the size and corrects it, if it is not fixed."""
        # Where forward or backward communicates, all ranks must run equally many chunks.
        self._in_step = trainer.world_size > 1 and (
            backward_sync.is_sharded(trainer.strategy) or backward_sync.has_synchronized_batchnorm(model)
        )

    def make_closure(self, kwargs: Any, optimizer: Any, batch_idx: int) -> MicrobatchedClosure:
        """Takes the place of the training loop's method of that name."""
        backward = training_loop.backward_fn(self.trainer, optimizer)
        zero_grad = training_loop.zero_grad_fn(self.trainer, batch_idx, optimizer)
        return MicrobatchedClosure(self, kwargs, backward, zero_grad)

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
        with PastGradients(self._parameters(), zero_grad, self.trainer.strategy) as past:
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
        assert isinstance(self._size, size_choice.FixedSplit)
        batch = kwargs["batch"]
        count = self._size.num_microbatches
        if count is None:
            assert self._size.microbatch_size is not None
            count = self.splitter.num_microbatches(batch, self._size.microbatch_size)
        return self.commit(self.run_chunks(kwargs, backward, self.chunks(batch, count)))

    def chunks(self, batch: Any, count: int) -> list[Chunk]:
        """The chunks to run, equally many on all ranks where they must be.

        Args:
            batch: the whole batch.
            count: how many to make of it.

        Returns:
            At least one chunk.
        """
        if self._in_step:
            count = backward_sync.highest_of_ranks(self.trainer, count)
        chunks = self.splitter.split(batch, count)
        if self._in_step:
            # A rank with fewer chunks repeats its first one, at weight 0.
            repeated = Chunk(chunks[0].batch, 0.0, chunks[0].num_samples, repeated=True)
            chunks += [repeated] * (backward_sync.highest_of_ranks(self.trainer, len(chunks)) - len(chunks))
        return chunks

    def run_chunks(
        self, kwargs: Any, backward: Backward, chunks: list[Chunk], communicate: bool = True
    ) -> BatchOutcome:
        """Forward and backward of chunks. What they log is kept back for :meth:`commit`.

        Args:
            kwargs: arguments of ``training_step`` by name.
            backward: backward of a loss; ``None`` to skip it.
            chunks: what to run.
            communicate: whether the last backward averages gradients over ranks.

        Returns:
            All that came of it.
        """
        if len(chunks) > 1:
            backward_sync.broadcast_buffers(self.trainer.strategy)
            self._metrics.begin()
        try:
            with self._batchnorm.batch(len(chunks)):
                if self._batchnorm.synchronizes:
                    outcome = self._synchronized(kwargs, backward, chunks, communicate)
                else:
                    outcome = self._run_all(kwargs, backward, chunks, communicate)
                self._batchnorm.finish()
        except BaseException:
            self._metrics.abandon()
            raise
        return outcome

    def _run_all(
        self, kwargs: Any, backward: Backward, chunks: list[Chunk], communicate: bool
    ) -> BatchOutcome:
        strategy, outcome = self.trainer.strategy, BatchOutcome(self.splitter.loss_reduction == "sum")
        self._carried.begin(chunks)
        last = max((i for i, chunk in enumerate(chunks) if chunk.weight > 0 or self._in_step), default=0)
        for index, chunk in enumerate(chunks):
            # That of a probe would last on.
            if len(chunks) > 1 or (self.recovery is not None and self.recovery.has_probed):
                annotate(f"microbatch {index + 1} of {len(chunks)}")
            with (
                backward_sync.gradient_sync(strategy, communicate and index == last, self._waits),
                partial_backward(index != last),
                self._batchnorm.chunk(),
                self._recorded(recorder := CallRecorder(), counts=not chunk.repeated),
            ):
                loss, extra = self._run_chunk(kwargs, backward, chunk, outcome if index == last else None)
            if not chunk.repeated:
                outcome.add(chunk, loss, self.trainer.accumulate_grad_batches, extra, recorder)
        return outcome

    @contextmanager
    def _recorded(self, recorder: CallRecorder, counts: bool = True) -> Iterator[None]:
        """Write down what a chunk logs, and what metrics are given and return."""

        def note_source(name: str, value: Any) -> None:
            recorder.source = self._metrics.source_of(name, value)

        with (
            training_loop.results_replaced(self.trainer, recorder),
            self._metrics.chunk(counts),
            training_loop.log_watched(self.model, note_source)
            if self._metrics.are_watched
            else nullcontext(),
        ):
            yield

    def _synchronized(
        self, kwargs: Any, backward: Backward, chunks: list[Chunk], communicate: bool
    ) -> BatchOutcome:
        """All chunks, normalised by the statistics of the whole batch, which a first pass finds."""
        scaler, device = training_loop.grad_scaler(self.trainer), self.trainer.strategy.root_device
        before = BatchSnapshot(
            self.model,
            scaler,
            device,
            spared=self._batchnorm.running_statistics,
            batch=dict(kwargs),
            optimizers=self.trainer.optimizers,
        )
        annotate("batch statistics")
        with self._batchnorm.statistics_pass(), training_loop.results_replaced(self.trainer, CallRecorder()):
            training_loop.training_step(self.trainer, kwargs)
        for sweep in range(1, self._batchnorm.num_sweeps + 1):
            # The same noise in every pass, and nothing left of the pass before but what it learned.
            before.restore()
            self._metrics.abandon()
            self._metrics.begin()
            with self._batchnorm.sweep():
                final = sweep == self._batchnorm.num_sweeps
                outcome = self._run_all(kwargs, backward, chunks, communicate and final)
        return outcome

    def discard(self) -> None:
        """Take back what :meth:`run_chunks` did to metrics: it went well here, but not on another rank."""
        self._metrics.abandon()

    def commit(self, outcome: BatchOutcome) -> training_loop.ClosureResult:
        """Log once for the whole batch, and merge what its chunks returned.

        Args:
            outcome: of :meth:`run_chunks`, on all ranks: ``sync_dist`` communicates here.

        Returns:
            Loss and further outputs of the whole batch.
        """
        try:
            returned = self._metrics.end(outcome.logs)
            outcome.logs.replay(training_loop.results(self.trainer), outcome.num_samples, returned)
        except BaseException:
            self._metrics.abandon()
            raise
        self._metrics.keep()
        self._say_left_out(outcome)
        result = training_loop.ClosureResult(None, extra=outcome.merged_outputs())
        result.loss = result.closure_loss = outcome.loss
        return result

    def _run_chunk(
        self, kwargs: Any, backward: Backward, chunk: Chunk, before: BatchOutcome | None = None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Forward and backward of one chunk; its loss, not yet weighed, and what else it returned.

        For the last chunk that counts, ``before`` is what came of the others.
        """
        kwargs = type(kwargs)(kwargs)
        kwargs["batch"] = chunk.batch
        with self._carried.watch(chunk):
            output = training_loop.training_step(self.trainer, kwargs)
        loss = output.closure_loss
        weight = chunk.weight
        if before is not None:
            weight *= self._reweigh([*before.chunks, chunk], [*before.left_out, loss is None])
        # A chunk that does not count only runs for its outputs, and where ranks wait for each other.
        if loss is not None and backward is not None and (chunk.weight > 0 or self._in_step):
            # At weight 1 the loss is left alone, so that one chunk is plain Lightning to the bit.
            backward(loss if weight == 1.0 else loss * weight)
        return output.loss, output.extra

    def _reweigh(self, chunks: list[Chunk], left_out: list[bool]) -> float:
        """Let the chunks that have a loss count for those that have none, before the last backward."""
        factor = factor_of_the_rest(chunks, left_out)
        if factor == 1.0 or self.splitter.loss_reduction == "sum":
            return 1.0
        refuse_left_out(self.trainer, sum(left_out))
        if self.trainer.accumulate_grad_batches > 1:
            return 1.0  # here a whole batch without a loss counts as zero, too
        with torch.no_grad():
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return factor

    def _say_left_out(self, outcome: BatchOutcome) -> None:
        num_chunks, num_left_out = len(outcome.chunks), outcome.num_left_out
        if self._said_left_out or not 0 < num_left_out < num_chunks:
            return
        if outcome.factor == 1.0 and not outcome.sum_losses:
            return  # those without a loss had no weight
        self._said_left_out = True
        amid_window = self.trainer.accumulate_grad_batches > 1 and not outcome.sum_losses
        rank_zero_warn(
            f"`training_step` returned `None` for {num_left_out} of {num_chunks} microbatches of a batch, so "
            "its loss, gradients, logs and outputs are those of the other microbatches"
            + (", except that zero is accumulated for the gradients that are missing" if amid_window else "")
            + ". If this was on purpose, ignore this warning."
        )

    def _parameters(self) -> list[Tensor]:
        """All that may have a gradient, once."""
        groups = (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        return [*dict.fromkeys((*self.model.parameters(), *(p for group in groups for p in group["params"])))]

    def run_trial(
        self,
        kwargs: Any,
        backward: Backward,
        count: int,
        watched: Callable[[], AbstractContextManager[None]],
        *,
        warms_up: bool,
    ) -> tuple[int, ChunkResult]:
        """Run the first of ``count`` chunks as if others had run before it. Nothing is logged.

        Args:
            kwargs: arguments of ``training_step`` by name.
            backward: backward of a loss; ``None`` to skip it.
            count: chunks to make of the batch.
            watched: around the run that is meant.
            warms_up: whether to run the chunk once before, so that there are gradients.

        Returns:
            Samples of the chunk, and what it would leave behind until the end of the batch.
        """
        chunks = self.splitter.split(kwargs["batch"], count)
        self._carried.begin(chunks)
        self._metrics.begin()
        with ExitStack() as undo:
            undo.callback(self._metrics.abandon)
            undo.enter_context(self._batchnorm.batch(count))
            undo.enter_context(backward_sync.gradient_sync(self.trainer.strategy, enabled=False))

            def run() -> ChunkResult:
                recorder = CallRecorder()
                with self._batchnorm.chunk(), self._recorded(recorder):
                    loss, extra = self._run_chunk(kwargs, backward, chunks[0])
                    return ChunkResult(loss, extra, recorder.logged_values(), self._metrics.kept())

            # Pooled statistics take more from the second chunk on.
            if warms_up or (self._batchnorm.has_layers and count > 1):
                run()
            with watched():
                kept = run()
        return chunks[0].num_samples or 1, kept
