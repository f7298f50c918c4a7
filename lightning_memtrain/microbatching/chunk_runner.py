"""Forward and backward of a batch, one chunk after the other, as one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memtrain.coordination import annotate, partial_backward
from lightning_memtrain.microbatching import backward_sync, rank_agreement, training_loop
from lightning_memtrain.microbatching.batch_snapshot import BatchSnapshot
from lightning_memtrain.microbatching.batchnorm.batchnorm_policy import BatchNormPolicy
from lightning_memtrain.microbatching.carried_state import CarriedState
from lightning_memtrain.microbatching.left_out_chunks import LeftOutChunks
from lightning_memtrain.microbatching.merging.batch_metrics import BatchMetrics
from lightning_memtrain.microbatching.merging.batch_outcome import BatchOutcome
from lightning_memtrain.microbatching.merging.chunk_logs import LogRecorder
from lightning_memtrain.microbatching.splitting.chunks import Chunk, Splitter
from lightning_memtrain.microbatching.training_loop import Backward


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


class ChunkRunner:
    """Runs batches as chunks for one trainer; how many there are is decided by those who call it.

    Args:
        trainer: the trainer that fits.
        model: its module.
        splitter: splits and weighs.
        batchnorm: what batch normalisation does about chunks.
        sync_each_chunk: whether sharded gradients are reduced in each chunk's backward, or in the last one's.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule,
        splitter: Splitter,
        batchnorm: BatchNormPolicy,
        sync_each_chunk: bool = True,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.splitter = splitter
        self._batchnorm = batchnorm
        self._metrics = BatchMetrics(model)
        self._left_out = LeftOutChunks(trainer, sum_losses=splitter.loss_reduction == "sum")
        self._waits = not sync_each_chunk
        self._carried = CarriedState(model)
        # Where forward or backward communicates, all ranks must run equally many chunks.
        self._in_step = trainer.world_size > 1 and (
            rank_agreement.is_sharded(trainer.strategy) or rank_agreement.has_synchronized_batchnorm(model)
        )

    def chunks(self, batch: Any, count: int) -> list[Chunk]:
        """The chunks to run, equally many on all ranks where they must be.

        Args:
            batch: the whole batch.
            count: how many to make of it.

        Returns:
            At least one chunk.
        """
        if self._in_step:
            count = rank_agreement.highest_of_ranks(self.trainer, count)
        chunks = self.splitter.split(batch, count)
        if self._in_step:
            # A rank with fewer chunks repeats its first one, at weight 0.
            repeated = Chunk(chunks[0].batch, 0.0, chunks[0].num_samples, repeated=True)
            chunks += [repeated] * (rank_agreement.highest_of_ranks(self.trainer, len(chunks)) - len(chunks))
        return chunks

    def run_chunks(
        self,
        kwargs: Any,
        backward: Backward,
        chunks: list[Chunk],
        *,
        communicate: bool = True,
        after_probe: bool = False,
    ) -> BatchOutcome:
        """Forward and backward of chunks. What they log is kept back for :meth:`commit`.

        Args:
            kwargs: arguments of ``training_step`` by name.
            backward: backward of a loss; ``None`` to skip it.
            chunks: what to run.
            communicate: whether the last backward averages gradients over ranks.
            after_probe: whether the batch was probed, whose annotation would last on.

        Returns:
            All that came of it.
        """
        if len(chunks) > 1:
            backward_sync.broadcast_buffers(self.trainer.strategy.model)
            self._metrics.begin()
        try:
            return self._batchnorm.run(
                len(chunks),
                lambda final: self._run_all(kwargs, backward, chunks, communicate and final, after_probe),
                lambda: self._run_whole(kwargs),
                lambda: self._save(kwargs),
            )
        except BaseException:
            self._metrics.abandon()
            raise

    def _run_all(
        self, kwargs: Any, backward: Backward, chunks: list[Chunk], communicate: bool, after_probe: bool
    ) -> BatchOutcome:
        strategy, outcome = self.trainer.strategy, BatchOutcome(self.splitter.loss_reduction == "sum")
        self._carried.begin(chunks)
        last = max((i for i, chunk in enumerate(chunks) if chunk.weight > 0 or self._in_step), default=0)
        for index, chunk in enumerate(chunks):
            if len(chunks) > 1 or after_probe:
                annotate(f"microbatch {index + 1} of {len(chunks)}")
            with (
                backward_sync.gradient_sync(strategy, communicate and index == last, self._waits),
                partial_backward(index != last),
                self._batchnorm.chunk(),
                self._recorded(recorder := LogRecorder(), counts=not chunk.repeated),
            ):
                loss, extra = self._run_chunk(kwargs, backward, chunk, outcome if index == last else None)
            if not chunk.repeated:
                outcome.add(chunk, loss, self.trainer.accumulate_grad_batches, extra, recorder)
        return outcome

    @contextmanager
    def _recorded(self, recorder: LogRecorder, counts: bool = True) -> Iterator[None]:
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

    def _run_whole(self, kwargs: Any) -> None:
        """Forward of the whole batch, for its statistics; what it logs is forgotten."""
        annotate("batch statistics")
        with training_loop.results_replaced(self.trainer, LogRecorder()):
            training_loop.training_step(self.trainer, kwargs)

    def _save(self, kwargs: Any) -> Callable[[], None]:
        """Keep the state before a batch that runs several times; what is returned sets it back.

        So each time has the same noise, and nothing is left of the time before but what batch normalisation
        has learned from it.
        """
        before = BatchSnapshot(
            self.model,
            training_loop.grad_scaler(self.trainer),
            self.trainer.strategy.root_device,
            spared=self._batchnorm.running_statistics,
            batch=dict(kwargs),
            optimizers=self.trainer.optimizers,
        )

        def set_back() -> None:
            before.restore()
            self._metrics.abandon()
            self._metrics.begin()

        return set_back

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
        self._left_out.warn(outcome)
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
            chunks, left_out = [*before.chunks, chunk], [*before.left_out, loss is None]
            weight *= self._left_out.reweigh(chunks, left_out, self.parameters())
        # A chunk that does not count only runs for its outputs, and where ranks wait for each other.
        if loss is not None and backward is not None and (chunk.weight > 0 or self._in_step):
            # At weight 1 the loss is left alone, so that one chunk is plain Lightning to the bit.
            backward(loss if weight == 1.0 else loss * weight)
        return output.loss, output.extra

    def parameters(self) -> list[Tensor]:
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
                recorder = LogRecorder()
                with self._batchnorm.chunk(), self._recorded(recorder):
                    loss, extra = self._run_chunk(kwargs, backward, chunks[0])
                    return ChunkResult(loss, extra, recorder.logged_values(), self._metrics.kept())

            # Pooled statistics take more from the second chunk on.
            if warms_up or (self._batchnorm.has_layers and count > 1):
                run()
            with watched():
                kept = run()
        return chunks[0].num_samples or 1, kept
