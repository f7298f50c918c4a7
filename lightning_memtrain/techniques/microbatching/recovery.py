"""Running a batch again when memory runs out, so that the run equals one in which it never did."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.core import format_bytes, is_out_of_memory
from lightning_memtrain.techniques.microbatching import _compat, parallel, sizing
from lightning_memtrain.techniques.microbatching.probe import Peak, largest_fitting
from lightning_memtrain.techniques.microbatching.snapshot import BatchSnapshot

if TYPE_CHECKING:
    from lightning_memtrain.techniques.microbatching.engine import Backward, MicrobatchEngine


class Recovery:
    """Runs one batch again with smaller chunks whenever memory runs out, on all ranks alike.

    Args:
        engine: runs the chunks.
        size: the size to use and to correct.
    """

    def __init__(self, engine: MicrobatchEngine, size: sizing.AutoSize) -> None:
        self._engine = engine
        self._size = size
        self._trainer = engine.trainer
        self._device = self._trainer.strategy.root_device

    def run(self, kwargs: Any, backward: Backward) -> _compat.ClosureResult:
        """As :meth:`MicrobatchEngine.run`."""
        engine, size, trainer, batch = self._engine, self._size, self._trainer, kwargs["batch"]
        delayed = parallel.DelayedGradientSync(trainer.strategy)
        parallel.broadcast_buffers(trainer.strategy)
        results = _compat.results(trainer)
        logged = _compat.results_state(results)
        snapshot = self._snapshot()
        has_state = any(optimizer.state for optimizer in trainer.optimizers)
        to_probe = size.is_unknown_for(engine.splitter.batch_size(batch), has_state)
        if parallel.highest_of_ranks(trainer, int(to_probe)):
            self._probe(kwargs, backward, snapshot)
        retries = sizing.allocation_retries(self._device)
        while True:
            assert size.size is not None
            attempted, outcome, result, failure = size.size, None, None, ""
            try:
                chunks = engine.chunks(batch, engine.splitter.num_microbatches(batch, size.size))
                attempted = max(chunk.num_samples or 1 for chunk in chunks)
                outcome = engine.run_chunks(kwargs, backward, chunks, communicate=not delayed.needed)
                if not delayed.needed:
                    result = engine.commit(outcome)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error) or type(error).__name__
            # Outside of the `except` block, whose exception holds on to the tensors of the failed chunk.
            retried = sizing.allocation_retries(self._device) > retries
            verdict = parallel.highest_of_ranks(trainer, 2 if failure else int(retried))
            if verdict < 2:
                assert outcome is not None
                delayed.average_gradients()
                size.succeeded(trainer.global_step, retried=verdict == 1)
                # Logging communicates, so with several ranks it waits until all of them are here.
                return result if result is not None else engine.commit(outcome)
            outcome, chunks = None, []
            engine.discard()
            _compat.restore_results(results, logged)
            _restore(snapshot)
            _release_memory(self._device)
            attempted = parallel.highest_of_ranks(trainer, attempted)
            if attempted == 1:
                raise torch.OutOfMemoryError(
                    "Out of memory with a single sample at a time, so `Microbatching` cannot help further. "
                    f"The device said: {failure or 'out of memory on another rank'}"
                )
            size.failed(trainer.global_step, attempted)

    def _snapshot(self) -> BatchSnapshot:
        arguments = (self._engine.model, _compat.grad_scaler(self._trainer), self._device)
        try:
            return BatchSnapshot(*arguments)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Nothing has changed yet, and what an iterator or the allocator's cache held may be free now.
        _release_memory(self._device)
        return BatchSnapshot(*arguments)

    def _probe(self, kwargs: Any, backward: Backward, snapshot: BatchSnapshot) -> None:
        """Find the size to start from. Leaves no trace but the size."""
        engine, size, trainer = self._engine, self._size, self._trainer
        batch_size = engine.splitter.batch_size(kwargs["batch"])
        free_bytes = self._free_bytes()
        amid_window = trainer.accumulate_grad_batches > 1
        held_bytes = snapshot.num_bytes(amid_window)
        has_gradients = False

        def run(num_chunks: int) -> Peak | None:
            nonlocal has_gradients
            try:
                if num_chunks == 1 and not amid_window:
                    _restore(snapshot)  # nothing before this one has left gradients
                elif not has_gradients:
                    engine.probe(kwargs, backward, num_chunks, held_bytes)
                has_gradients = num_chunks > 1
                return engine.probe(kwargs, backward, num_chunks, held_bytes)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return None

        def measure(num_chunks: int) -> Peak:
            asked = -(-batch_size // num_chunks)
            found = run(num_chunks)
            if found is None:
                _release_memory(self._device)
                found = run(num_chunks) or Peak(asked, None)  # once more without what the allocator kept
            if found.size != asked:
                raise MisconfigurationException(
                    '`Microbatching(microbatch_size="auto")` needs chunks of even size, but asked for '
                    f"{num_chunks} chunks of {batch_size} samples `split_fn` returned a first one with "
                    f"{found.size}. With this `split_fn`, use `num_microbatches` instead."
                )
            return found

        try:
            peak = largest_fitting(measure, batch_size, free_bytes)
        finally:
            _restore(snapshot)
        if size.limit_bytes is not None and peak.num_bytes is not None and peak.num_bytes > free_bytes:
            raise MisconfigurationException(
                "`Microbatching(limit)` must have room for one sample at a time, which takes "
                f"{format_bytes(peak.num_bytes)}, but got limit={format_bytes(free_bytes)}. Raise it, or "
                "make weights, gradients or optimizer state smaller: microbatching only shrinks activations."
            )
        agreed = -parallel.highest_of_ranks(trainer, -peak.size)
        has_state = any(optimizer.state for optimizer in trainer.optimizers)
        size.start(trainer.global_step, agreed, batch_size, peak.num_bytes, free_bytes, has_state)

    def _free_bytes(self) -> int:
        if self._size.limit_bytes is not None:
            return self._size.limit_bytes
        free_bytes = sizing.free_device_bytes(self._device)
        assert free_bytes is not None
        return free_bytes


def _restore(snapshot: BatchSnapshot) -> None:
    try:
        snapshot.restore()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        snapshot.restore()  # needs no memory to speak of; what failed was somebody else's in between


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
