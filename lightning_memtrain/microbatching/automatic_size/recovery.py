"""Running a batch again when memory runs out, so that the run equals one in which it never did."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.coordination import recovering
from lightning_memtrain.core import does_not_fit, is_out_of_memory, release_memory, without_frames
from lightning_memtrain.microbatching import backward_sync, rank_agreement, training_loop
from lightning_memtrain.microbatching.automatic_size import size_choice
from lightning_memtrain.microbatching.automatic_size.limit_errors import (
    other_limit_error,
)
from lightning_memtrain.microbatching.automatic_size.size_probe import SizeProbe
from lightning_memtrain.microbatching.automatic_size.update_forecast import update_signature
from lightning_memtrain.microbatching.automatic_size.update_guard import UpdateGuard
from lightning_memtrain.microbatching.batch_snapshot import BatchSnapshot, WrittenTensors, restore
from lightning_memtrain.microbatching.chunk_runner import ChunkRunner
from lightning_memtrain.microbatching.merging.batch_outcome import BatchOutcome
from lightning_memtrain.microbatching.training_loop import Backward

# What ranks say of an attempt; the worst counts.
_RETRIED, _FAILED, _REFUSED = 1, 2, 3


class _Attempt(NamedTuple):
    """What came of running a batch in chunks of one size.

    Args:
        num_samples: of the largest chunk.
        outcome: of all chunks; ``None`` if they did not fit.
        result: what the loop is given, if it is known already.
        said: by what did not fit; empty if all went well.
        why: the same for the report.
        refusal: what is to be raised, if smaller chunks cannot help.
    """

    num_samples: int
    outcome: BatchOutcome | None = None
    result: training_loop.ClosureResult | None = None
    said: str = ""
    why: str = "out of memory"
    refusal: Exception | None = None

    def verdict(self, has_retried: bool) -> int:
        """What this rank says of it.

        Args:
            has_retried: whether the allocator had to free its cache and try again.

        Returns:
            A number, the worse the higher.
        """
        if self.refusal is not None:
            return _REFUSED
        return _FAILED if self.said else int(has_retried)


class Recovery:
    """Runs batches with the size that fits, and again with smaller chunks when memory runs out.

    All ranks probe when one of them has to, and run a batch again when one of them ran out of memory. Each
    has the size that its own batches fit with; where ranks wait for each other they run as many chunks.

    Args:
        runner: runs the chunks.
        size: the size to use and to correct.
    """

    def __init__(self, runner: ChunkRunner, size: size_choice.AutoSize) -> None:
        self._runner = runner
        self._size = size
        self._trainer = runner.trainer
        self._device = self._trainer.strategy.root_device
        self._written = WrittenTensors()
        self._guard = UpdateGuard(self._trainer, runner.model)
        self._probe = SizeProbe(runner, size, self._guard)
        self._batch: Any = None

    # ------------------------------------------------------------------ a batch

    def begin_batch(self, batch: Any) -> None:
        """Watch a batch that is going to be probed from its very beginning.

        Args:
            batch: the whole batch.
        """
        self.end_batch()
        self._batch = batch
        with suppress(MisconfigurationException):  # a batch that cannot be split is refused when it is run
            if self._size.size_for(self._probe.conditions(batch, held_bytes=0)) is None:
                self._probe.watch(batch)

    def before_update(self) -> None:
        """Watch the step of the optimizer if nobody knows what it will hold."""
        if self._size.limit_bytes is not None:
            signature = update_signature(self._trainer.optimizers)
            self._guard.begin(signature, self._batch, self._size.limit_bytes)

    def around_update(self, step: Callable[[], None]) -> None:
        """Take a step of the optimizer.

        Args:
            step: takes it, with the closure that it calls.

        Raises:
            MisconfigurationException: on all ranks, if one of them cannot keep the limit in a step that could
                not be foretold.
        """
        self._guard.around_step(step)

    def end_batch(self) -> None:
        """Stop watching the batch and its step, wherever they have ended."""
        self._guard.end()
        self._batch = None
        self._probe.stop()

    def run(self, kwargs: Any, backward: Backward) -> training_loop.ClosureResult:
        """Forward and backward of one batch, in chunks of the size that fits.

        Args:
            kwargs: arguments of ``training_step`` by name.
            backward: backward of a loss; ``None`` to skip it.

        Returns:
            Loss and further outputs of the whole batch.

        Raises:
            torch.OutOfMemoryError: on all ranks, if a single sample at a time does not fit on one of them.
        """
        self._guard.before_evaluation()
        runner, size, trainer = self._runner, self._size, self._trainer
        delayed = backward_sync.DelayedGradientSync(trainer.strategy)
        backward_sync.broadcast_buffers(trainer.strategy.model)
        results = training_loop.results(trainer)
        logged = training_loop.results_state(results)
        snapshot, has_probed = self._ready(kwargs, backward)
        retries = size_choice.allocation_retries(self._device)
        while True:
            attempt = self._attempt(kwargs, backward, communicate=not delayed.needed, after_probe=has_probed)
            # What ends the run is agreed on before any rank raises: the others would wait for it.
            has_retried = size_choice.allocation_retries(self._device) > retries
            verdict = rank_agreement.highest_of_ranks(trainer, attempt.verdict(has_retried))
            if verdict < _FAILED:
                assert attempt.outcome is not None
                delayed.average_gradients()
                size.succeeded(trainer.global_step, retried=verdict == _RETRIED)
                # Logging communicates, so with several ranks it waits until all of them are here.
                return attempt.result if attempt.result is not None else runner.commit(attempt.outcome)
            failed = attempt._replace(outcome=None, result=None)
            del attempt  # what came of the batch
            runner.discard()
            training_loop.restore_results(results, logged)
            restore(snapshot)
            release_memory(self._device)
            if verdict == _REFUSED:  # a limit of somebody else's, in its own words
                raise failed.refusal or other_limit_error()
            self._take_smaller(failed)

    def _ready(self, kwargs: Any, backward: Backward) -> tuple[BatchSnapshot, bool]:
        """The state before the batch, with a size for it; and whether the batch was probed for that."""
        probe, batch, snapshot = self._probe, kwargs["batch"], self._snapshot(kwargs)
        held_bytes = snapshot.reachable_bytes + snapshot.num_bytes(probe.accumulates)
        now = probe.conditions(batch, held_bytes)
        if not rank_agreement.highest_of_ranks(self._trainer, int(self._size.choose(now) is None)):
            probe.stop()
            return snapshot, False
        # The ledger's hooks are part of the state that each trial begins with, and not of the batch's.
        if not probe.is_watching:
            probe.watch(batch)
            snapshot = self._snapshot(kwargs)
        try:
            probe.find(kwargs, backward, snapshot, now)
        finally:
            probe.stop()
        return self._snapshot(kwargs), True

    def _attempt(self, kwargs: Any, backward: Backward, *, communicate: bool, after_probe: bool) -> _Attempt:
        """Run the batch in chunks of the size that there is now."""
        runner, size, batch = self._runner, self._size.size, kwargs["batch"]
        assert size is not None
        num_samples = size
        try:
            chunks = runner.chunks(batch, runner.splitter.num_microbatches(batch, size))
            num_samples = max(chunk.num_samples or 1 for chunk in chunks)
            with recovering(num_samples > 1), self._guard.chunks():
                outcome = runner.run_chunks(
                    kwargs, backward, chunks, communicate=communicate, after_probe=after_probe
                )
            result = runner.commit(outcome) if communicate else None
            return _Attempt(num_samples, outcome, result)
        except Exception as error:
            if not does_not_fit(error):
                raise
            said = str(error) or type(error).__name__
            if is_out_of_memory(error):
                return _Attempt(num_samples, said=said)
            refusal = without_frames(error) if num_samples == 1 else None
            return _Attempt(num_samples, said=said, why="a limit is out of reach", refusal=refusal)

    def _take_smaller(self, failed: _Attempt) -> None:
        """Let all ranks take half of what one of them could not run."""
        trainer, elsewhere = self._trainer, "out of memory on another rank"
        num_samples = rank_agreement.highest_of_ranks(trainer, failed.num_samples)
        if num_samples == 1:
            raise torch.OutOfMemoryError(
                "Out of memory with a single sample at a time, so `Microbatching` cannot help further. "
                f"The device said: {failed.said or elsewhere}"
            )
        self._size.failed(trainer.global_step, num_samples, failed.why if failed.said else elsewhere)

    def _snapshot(self, kwargs: Any) -> BatchSnapshot:
        def make() -> BatchSnapshot:
            return BatchSnapshot(
                self._runner.model,
                training_loop.grad_scaler(self._trainer),
                self._device,
                batch=dict(kwargs),
                optimizers=self._trainer.optimizers,
                constant=training_loop.logged_tensors(self._trainer),
                written=self._written,
            )

        try:
            return make()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Nothing has changed yet, and what an iterator or the allocator's cache held may be free now.
        release_memory(self._device)
        return make()
