"""Running a batch again when memory runs out, so that the run equals one in which it never did."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.coordination import aside
from lightning_memtrain.core import does_not_fit, is_out_of_memory, release_memory, without_frames
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.microbatching import _compat, parallel, sizing
from lightning_memtrain.microbatching.circumstances import Circumstances, Found, trained_parameters
from lightning_memtrain.microbatching.probe import largest_fitting
from lightning_memtrain.microbatching.refusals import (
    limit_out_of_reach_elsewhere,
    limit_refused,
    refused_elsewhere,
    update_refused,
)
from lightning_memtrain.microbatching.snapshot import BatchSnapshot, WrittenTensors, restore
from lightning_memtrain.microbatching.trial import Trials
from lightning_memtrain.microbatching.update import update_signature
from lightning_memtrain.microbatching.update_guard import UpdateGuard

if TYPE_CHECKING:
    from lightning_memtrain.microbatching.engine import Backward, MicrobatchEngine


class Recovery:
    """Runs batches with the size that fits, and again with smaller chunks when memory runs out.

    All ranks probe when one of them has to, and run a batch again when one of them ran out of memory. Each
    has the size that its own batches fit with; where ranks wait for each other they run as many chunks.

    Args:
        engine: runs the chunks.
        size: the size to use and to correct.
    """

    def __init__(self, engine: MicrobatchEngine, size: sizing.AutoSize) -> None:
        self._engine = engine
        self._size = size
        self._trainer = engine.trainer
        self._device = self._trainer.strategy.root_device
        self._written = WrittenTensors()
        self._ledger: MemoryLedger | None = None
        self._guard = UpdateGuard(self._trainer, engine.model)
        self._guarded: set[str] = set()  # signatures of steps that could not be foretold
        self._batch: Any = None
        self._unknown_bytes: int | None = None  # within reach before the first batch, but used in no step
        self.has_probed = False
        """Whether the batch at hand was probed."""

    # ------------------------------------------------------------------ a batch

    def begin_batch(self, batch: Any) -> None:
        """Watch a batch that is going to be probed from its very beginning.

        Args:
            batch: the whole batch.
        """
        self.end_batch()
        self._batch = batch
        with suppress(MisconfigurationException):  # a batch that cannot be split is refused when it is run
            if self._size.size_for(self._circumstances(batch, held_bytes=0)) is None:
                self._watch(batch)

    def before_update(self) -> None:
        """Watch the step of the optimizer if nobody knows what it will hold."""
        signature = update_signature(self._trainer.optimizers)
        if signature in self._guarded and self._size.limit_bytes is not None:
            self._guard.begin(signature, self._batch, self._size.limit_bytes)

    def end_batch(self) -> None:
        """Stop watching."""
        self._guard.end()
        self._batch = None
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._ledger is not None:
            self._ledger.__exit__(None, None, None)
            self._ledger = None

    def run(self, kwargs: Any, backward: Backward) -> _compat.ClosureResult:
        """As :meth:`MicrobatchEngine.run`."""
        engine, size, trainer, batch = self._engine, self._size, self._trainer, kwargs["batch"]
        delayed = parallel.DelayedGradientSync(trainer.strategy)
        parallel.broadcast_buffers(trainer.strategy)
        results = _compat.results(trainer)
        logged = _compat.results_state(results)
        snapshot = self._snapshot(kwargs)
        now = self._circumstances(batch, snapshot.reachable_bytes + snapshot.num_bytes(self._amid_window))
        self.has_probed = bool(parallel.highest_of_ranks(trainer, int(size.choose(now) is None)))
        if self.has_probed:
            # The ledger's hooks are part of the state that each trial begins with, and not of the batch's.
            if self._ledger is None:
                self._watch(batch)
                snapshot = self._snapshot(kwargs)
            try:
                self._probe(kwargs, backward, snapshot, now)
            finally:
                self._stop_watching()
            snapshot = self._snapshot(kwargs)
        else:
            self._stop_watching()
        retries = sizing.allocation_retries(self._device)
        while True:
            assert size.size is not None
            attempted, outcome, result, failure, why = size.size, None, None, "", "out of memory"
            refusal: Exception | None = None
            try:
                chunks = engine.chunks(batch, engine.splitter.num_microbatches(batch, size.size))
                attempted = max(chunk.num_samples or 1 for chunk in chunks)
                outcome = engine.run_chunks(kwargs, backward, chunks, communicate=not delayed.needed)
                if not delayed.needed:
                    result = engine.commit(outcome)
            except Exception as error:
                if not does_not_fit(error):
                    raise
                failure = str(error) or type(error).__name__
                if not is_out_of_memory(error):
                    why = "a limit is out of reach"
                    refusal = without_frames(error) if attempted == 1 else None
            # Outside of the `except` block, whose exception holds on to the tensors of the failed chunk.
            retried = sizing.allocation_retries(self._device) > retries
            # What ends the run is agreed on before any rank raises: the others would wait for it.
            said = 3 if refusal is not None else 2 if failure else int(retried)
            verdict = parallel.highest_of_ranks(trainer, said)
            if verdict < 2:
                assert outcome is not None
                delayed.average_gradients()
                size.succeeded(trainer.global_step, retried=verdict == 1)
                # Logging communicates, so with several ranks it waits until all of them are here.
                return result if result is not None else engine.commit(outcome)
            outcome, chunks = None, []
            engine.discard()
            _compat.restore_results(results, logged)
            restore(snapshot)
            release_memory(self._device)
            if verdict == 3:  # a limit of somebody else's, in its own words
                raise refusal or limit_out_of_reach_elsewhere()
            attempted = parallel.highest_of_ranks(trainer, attempted)
            if attempted == 1:
                raise torch.OutOfMemoryError(
                    "Out of memory with a single sample at a time, so `Microbatching` cannot help further. "
                    f"The device said: {failure or 'out of memory on another rank'}"
                )
            size.failed(trainer.global_step, attempted, why if failure else "out of memory on another rank")

    def _snapshot(self, kwargs: Any) -> BatchSnapshot:
        def make() -> BatchSnapshot:
            return BatchSnapshot(
                self._engine.model,
                _compat.grad_scaler(self._trainer),
                self._device,
                batch=dict(kwargs),
                optimizers=self._trainer.optimizers,
                constant=_compat.logged_tensors(self._trainer),
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

    # ------------------------------------------------------------------ the size

    def _circumstances(self, batch: Any, held_bytes: int) -> Circumstances:
        engine = self._engine
        tensors = [tensor for tensor in tensors_in(batch) if tensor.device.type == self._device.type]
        # Only the default way of splitting is known to split along the first axis.
        first = 1 if engine.splitter.split_fn is None else 0
        return Circumstances(
            num_samples=engine.splitter.batch_size(batch),
            shapes=tuple(tuple(tensor.shape[first:]) for tensor in tensors),
            batch_bytes=sum(tensor.nbytes for tensor in tensors),
            trained=trained_parameters(engine.model),
            amid_window=self._amid_window,
            held_bytes=held_bytes,
            update=update_signature(self._trainer.optimizers),
        )

    @property
    def _amid_window(self) -> bool:
        return self._trainer.accumulate_grad_batches > 1

    def _watch(self, batch: Any) -> None:
        ledger = MemoryLedger(self._engine.model, self._trainer.optimizers, batch, device=self._device)
        self._ledger = ledger.__enter__()

    def _probe(self, kwargs: Any, backward: Backward, snapshot: BatchSnapshot, now: Circumstances) -> None:
        """Find the size to start from. Leaves no trace but the size."""
        trainer, limit_bytes = self._trainer, self._limit_bytes()
        # A rank whose batch fits as a whole may be asked for chunks, which find gradients of others.
        finds_gradients = now.amid_window or trainer.world_size > 1
        assert self._ledger is not None
        unknown_bytes = snapshot.bytes_unknown_to(self._ledger)
        if self._unknown_bytes is None:
            self._unknown_bytes = unknown_bytes
        spared_bytes = 0 if finds_gradients else sum(p.nbytes for p in self._engine.model.parameters())
        with aside("probe"):
            trials = Trials(
                self._engine,
                kwargs,
                backward,
                snapshot,
                self._ledger,
                self._guard,
                limit_bytes,
                max(0, unknown_bytes - self._unknown_bytes),
                amid_window=now.amid_window,
                finds_gradients=finds_gradients,
            )
            try:
                peak = largest_fitting(trials.measure, now.num_samples, limit_bytes, spared_bytes)
            finally:
                restore(snapshot)
        refusal = self._refusal(trials, limit_bytes) if peak.size == 1 else None
        said = 0 if refusal is None else 2 if refusal is trials.out_of_reach.get(1) else 1
        verdict = parallel.highest_of_ranks(trainer, said)
        if verdict:
            raise refusal or (limit_out_of_reach_elsewhere() if verdict == 2 else refused_elsewhere())
        measured = trials.measured.get(peak.size)
        if trials.forecast is not None and trials.forecast.unknown:
            self._guarded.add(now.update)
        self._size.start(
            trainer.global_step,
            Found(
                size=peak.size,
                peak_bytes=peak.num_bytes,
                limit_bytes=limit_bytes,
                growing_bytes=0 if measured is None else measured.growing_bytes,
                kept_bytes=0 if measured is None else measured.kept_bytes,
                coming_bytes=trials.coming_bytes,
                updates=(now.update,) if trials.forecast is None else trials.forecast.signatures,
                made_for=now,
            ),
        )

    def _refusal(self, trials: Trials, limit_bytes: int) -> Exception | None:
        """The reason why a single sample at a time does not fit into a limit that was given."""
        if 1 in trials.out_of_reach:
            return trials.out_of_reach[1]
        if self._size.limit_bytes is None:
            return None
        single, at_least = trials.measured.get(1), False
        if single is None:
            needed_bytes = trials.needed_bytes.get(1)
            if needed_bytes is None:
                return None  # whatever else broke it off, such as the device itself, speaks for itself
            at_least, single = True, trials.least()._replace(chunks_bytes=needed_bytes, held=trials.held)
        if not at_least and single.peak_bytes <= limit_bytes:
            return None
        if single.update_bytes <= max(limit_bytes, single.chunks_bytes) or trials.forecast is None:
            return limit_refused(
                limit_bytes,
                single.chunks_bytes,
                single.held,
                trials.coming_bytes,
                trials.unseen,
                at_least=at_least,
            )
        return update_refused(
            limit_bytes,
            single.update_bytes,
            single.left,
            trials.forecast.kept_bytes,
            trials.forecast.over_bytes,
            trials.unseen_before_update,
        )

    def _limit_bytes(self) -> int:
        if self._size.limit_bytes is not None:
            return self._size.limit_bytes
        free_bytes = sizing.free_device_bytes(self._device)
        assert free_bytes is not None
        return free_bytes
