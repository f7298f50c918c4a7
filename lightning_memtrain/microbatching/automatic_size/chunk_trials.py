"""Trying chunks of a batch without ever going beyond a limit, and without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_memtrain.compat.torch_private import storage_key
from lightning_memtrain.coordination import annotate, recovering
from lightning_memtrain.core import (
    Category,
    CategoryBytes,
    does_not_fit,
    is_out_of_memory,
    release_memory,
    without_frames,
)
from lightning_memtrain.ledger import MemoryLedger, ResultBytes, allocator_statistics
from lightning_memtrain.ledger.tensors.distributed_tensors import gradients_lie_in_buckets
from lightning_memtrain.ledger.tensors.storages import storages_of, tensors_in
from lightning_memtrain.microbatching import training_loop
from lightning_memtrain.microbatching.automatic_size.chunk_measurement import ChunkMeasurement
from lightning_memtrain.microbatching.automatic_size.limit_errors import uneven_chunks_error
from lightning_memtrain.microbatching.automatic_size.size_search import Peak
from lightning_memtrain.microbatching.automatic_size.trial_limit import TrialLimit
from lightning_memtrain.microbatching.automatic_size.update_forecast import (
    UpdateForecast,
    clipping,
    forecast_update,
    update_signature,
)
from lightning_memtrain.microbatching.automatic_size.update_guard import UpdateGuard
from lightning_memtrain.microbatching.batch_snapshot import BatchSnapshot, restore
from lightning_memtrain.microbatching.chunk_runner import ChunkRunner
from lightning_memtrain.microbatching.training_loop import Backward
from lightning_memtrain.optimizer_steps import SupportsParameterStep
from lightning_memtrain.tracing.step.fake_step import LOGGED_BYTES

# What the allocator holds beyond the ledger is looked at twice if it is more than one part in so many.
_NOTABLE = 50
# A loss scaler looks for infinities and makes a few scalars.
_SCALER_BYTES = 512


class ChunkTrials:
    """Runs single chunks of one batch, each from the same state.

    A chunk is broken off before an operator would go beyond the limit. What the ledger does not see is
    allowed for: copies that are kept to run the batch again, optimizer state that the next steps make, and
    what the device's allocator holds beyond the ledger, as far as smaller chunks have shown it.

    Args:
        runner: runs the chunks.
        kwargs: arguments of ``training_step`` by name.
        backward: backward of a loss; ``None`` to skip it.
        snapshot: of the state before the batch.
        ledger: watches since the batch began.
        guard: knows of steps of the optimizer that cannot be foretold.
        limit_bytes: bytes that may be used in all.
        kept_bytes: what the batches before have left behind, and the ledger does not see.
        accumulating: whether gradients of earlier batches may be there.
        finds_gradients: whether a chunk that is the whole batch is to find gradients, too.
    """

    def __init__(
        self,
        runner: ChunkRunner,
        kwargs: Any,
        backward: Backward,
        snapshot: BatchSnapshot,
        ledger: MemoryLedger,
        guard: UpdateGuard,
        limit_bytes: int,
        kept_bytes: int,
        *,
        accumulating: bool,
        finds_gradients: bool,
    ) -> None:
        self.forecast: UpdateForecast | None = None
        self.measured: dict[int, ChunkMeasurement] = {}
        """Chunks that ran to their end, by their size."""
        self.needed_bytes: dict[int, int] = {}
        """What chunks needed at least that were broken off, by their size."""
        self.out_of_reach: dict[int, Exception] = {}
        """What others said that could not keep a limit of theirs, by the size of the chunk."""
        self.held = CategoryBytes()
        """What the ledger counted when a chunk was last broken off."""
        self._runner = runner
        self._trainer = runner.trainer
        self._kwargs = kwargs
        self._backward = backward
        self._snapshot = snapshot
        self._ledger = ledger
        self._guard = guard
        self._limit_bytes = limit_bytes
        self._kept_bytes = kept_bytes
        self._accumulating = accumulating
        self._finds_gradients = finds_gradients
        self._device = self._trainer.strategy.root_device
        self._results = ResultBytes(self._device)
        self._in_buckets = gradients_lie_in_buckets(runner.model)
        self._batch_size = runner.splitter.batch_size(kwargs["batch"])
        self._beyond_ledger: dict[int, int] = {}
        self._num_logged = 0
        self._sum_bytes = 0
        self._has_gradients = False  # of all parameters that get one
        self._leaves_more = False  # a chunk leaves more behind than its loss and what it has logged

    @property
    def coming_bytes(self) -> int:
        """What there is more of from the next batches on: optimizer state, and sums of what is logged."""
        state_bytes = 0 if self.forecast is None else self.forecast.kept_bytes
        return state_bytes + self._num_logged * LOGGED_BYTES

    @property
    def unseen_before_update(self) -> dict[str, int]:
        """What there is beside what the ledger counts when the optimizer steps, in words."""
        return {"what earlier batches have left": self._kept_bytes}

    @property
    def unseen(self) -> dict[str, int]:
        """The same while chunks run."""
        return self.unseen_before_update | {
            "copies to run the batch again": self._snapshot.num_bytes(self._accumulating),
            "workspace of operators": self._beyond(1),
        }

    @property
    def _unseen_bytes(self) -> int:
        """What there is while chunks run, and the ledger does not see."""
        return self._snapshot.num_bytes(self._accumulating) + self._kept_bytes

    def measure(self, num_chunks: int) -> Peak:
        """Run the largest of evenly split chunks.

        Args:
            num_chunks: chunks to make of the batch.

        Returns:
            Its peak; without bytes if it does not fit.

        Raises:
            ArgumentError: if ``split_fn`` does not split evenly.
        """
        size = -(-self._batch_size // num_chunks)
        left_more = self._leaves_more
        ran_out = self._run(num_chunks, size)
        if size not in self.measured:
            release_memory(self._device)
        if ran_out:
            self._run(num_chunks, size)  # once more without what the allocator kept
        elif self._beyond_ledger.get(size, 0) * _NOTABLE > self._ledger.current_bytes:
            self._run(num_chunks, size)  # it may have been for once, as when another technique measures
        elif not left_more and self._leaves_more:
            self._run(num_chunks, size)  # a cache is made by the first chunk alone: another one runs before
        measured = self.measured.get(size)
        return Peak(size, None if measured is None else measured.peak_bytes)

    def _run(self, num_chunks: int, size: int) -> bool:
        """Run a chunk; whether the device itself ran out of memory."""
        found: list[tuple[int, int, int | None]] = []
        new_gradient_bytes = 0
        limit = TrialLimit(self._allowed_bytes(size, num_chunks), self._results, self._snapshot.before_write)
        needs_gradients = self._finds_gradients or num_chunks > 1
        self._restore(with_gradients=needs_gradients)

        @contextmanager
        def watched() -> Iterator[None]:
            allocator = allocator_statistics(self._device)
            nonlocal new_gradient_bytes
            held_bytes, gradient_bytes = self._unseen_bytes, _gradient_bytes(self._runner.model)
            first = self._ledger.tick
            if allocator is not None:
                allocator.start()
            reading = None
            try:
                yield
            finally:
                if allocator is not None:
                    ends = (self._ledger.bytes_at(first), self._ledger.current_bytes)
                    reading = allocator.stop(*(num_bytes + held_bytes for num_bytes in ends))
            new_gradient_bytes = max(0, _gradient_bytes(self._runner.model) - gradient_bytes)
            found.append((first, self._ledger.tick, None if reading is None else reading.peak_bytes))

        ran_out = False
        had_gradients = self._has_gradients
        annotate(f"probe of {size} {'sample' if size == 1 else 'samples'}")
        try:
            with recovering(size > 1), self._ledger.limited(limit):
                num_samples, kept = self._runner.run_trial(
                    self._kwargs,
                    self._backward,
                    num_chunks,
                    watched,
                    warms_up=(num_chunks > 1 and self._leaves_more)
                    or (needs_gradients and not had_gradients),
                )
                self._num_logged = max(self._num_logged, len(kept.logged))
                on_device = [x for x in tensors_in(kept) if x.device.type == self._device.type]
                kept_bytes = sum(tensor.nbytes for tensor in on_device)
                first, last, _ = found[-1]
                left_bytes = self._ledger.bytes_at(last) - self._ledger.bytes_at(first)
                left_bytes -= new_gradient_bytes  # which the next chunks add up in
                if num_chunks > 1 and left_bytes > kept_bytes:  # such as features in an attribute
                    self._leaves_more, kept_bytes = True, left_bytes
                # Beside those of all chunks, the loss of the last one as it was, and their sum.
                if num_chunks > 1 and kept.loss is not None:
                    self._sum_bytes = 2 * kept.loss.nbytes
                if limit.needed_bytes is None:
                    if num_samples != size:
                        raise uneven_chunks_error(num_chunks, self._batch_size, num_samples)
                    self._note(size, num_chunks, *found[-1], kept_bytes)
        except Exception as error:
            if not does_not_fit(error):
                raise
            ran_out = is_out_of_memory(error)
            if limit.needed_bytes is None and not ran_out:
                self.out_of_reach[size] = without_frames(error)
        # Outside of the `except` block, whose exception holds on to the tensors of the failed chunk.
        if limit.needed_bytes is not None:
            self.needed_bytes[size] = limit.needed_bytes + self._limit_bytes - limit.limit_bytes
            self.held = self._ledger.held_between(self._ledger.tick, self._ledger.tick)
        if size in self.measured:
            self._has_gradients = True
        elif not had_gradients:
            restore(self._snapshot)  # drops those that there are of some parameters only
        return ran_out

    def _note(
        self,
        size: int,
        num_chunks: int,
        first: int,
        last: int,
        allocator_peak_bytes: int | None,
        kept_bytes: int,
    ) -> None:
        """Add up what a chunk that has just run would hold in a batch."""
        if self.forecast is None:
            self.forecast = self._forecast()
        held = self._ledger.held_between(first, last)
        ledger_bytes = held.total_bytes + self._unseen_bytes
        if allocator_peak_bytes is not None:
            beyond_bytes = max(0, allocator_peak_bytes - ledger_bytes)
            self._beyond_ledger[size] = min(beyond_bytes, self._beyond_ledger.get(size, beyond_bytes))
        beyond_bytes = self._beyond(size)
        others_bytes = (num_chunks - 1) * kept_bytes + self._sum_bytes * (num_chunks > 1)
        # Of gradients only those that the parameters have now will be there when the optimizer steps.
        left = self._ledger.held_between(self._ledger.tick, self._ledger.tick)
        growing_bytes = held.total_bytes - left.total_bytes
        gradient_bytes = 0 if self._in_buckets else _gradient_bytes(self._runner.model)
        left = CategoryBytes({**left, Category.GRADIENTS: gradient_bytes})
        self.measured[size] = ChunkMeasurement(
            chunks_bytes=ledger_bytes + beyond_bytes + others_bytes + self.coming_bytes,
            held=held,
            update_bytes=left.total_bytes
            + self._kept_bytes
            + others_bytes
            + self.forecast.over_bytes
            + self.coming_bytes
            - self.forecast.kept_bytes,
            left=left,
            growing_bytes=max(0, growing_bytes),
            kept_bytes=kept_bytes,
        )

    def least(self) -> ChunkMeasurement:
        """What a batch would hold at least if every parameter in training gets a gradient.

        Returns:
            The bytes until the optimizer has stepped, without any of the forward and backward.
        """
        self.forecast = self._forecast(every_gradient=True)
        left = self._ledger.held_between(self._ledger.tick, self._ledger.tick)
        trained = [p for p in self._runner.model.parameters() if p.requires_grad]
        gradient_bytes = 0 if self._in_buckets else sum(p.nbytes for p in trained)
        left = CategoryBytes({**left, Category.GRADIENTS: gradient_bytes})
        update_bytes = left.total_bytes + self._kept_bytes + self.forecast.over_bytes
        return ChunkMeasurement(0, CategoryBytes(), update_bytes, left, 0, 0)

    def _forecast(self, every_gradient: bool = False) -> UpdateForecast:
        trainer, precision = self._trainer, self._trainer.precision_plugin
        if isinstance(precision, SupportsParameterStep):
            return self._watched_so_far(f"{type(precision).__name__} steps in a way of its own")
        clips = clipping(trainer, self._runner.model)
        found = forecast_update(trainer.optimizers, self._device, clips, every_gradient=every_gradient)
        if found.unknown:
            return self._watched_so_far(found.unknown)
        if training_loop.grad_scaler(trainer) is not None:
            found = found._replace(over_bytes=found.over_bytes + _SCALER_BYTES)
        return found

    def _watched_so_far(self, unknown: str) -> UpdateForecast:
        signature = update_signature(self._trainer.optimizers)
        over_bytes = self._guard.over_bytes(signature)
        return UpdateForecast(over_bytes=over_bytes, signatures=(signature,), unknown=unknown)

    def _allowed_bytes(self, size: int, num_chunks: int) -> int:
        """What the ledger may count while a chunk runs."""
        kept_bytes = max((one.kept_bytes for one in self.measured.values()), default=0)
        reserved = self._unseen_bytes + self.coming_bytes
        others_bytes = (num_chunks - 1) * kept_bytes + self._sum_bytes * (num_chunks > 1)
        return self._limit_bytes - reserved - self._beyond(size) - others_bytes

    def _beyond(self, size: int) -> int:
        """What the allocator holds beyond the ledger, by the line through what the largest chunks showed."""
        if size in self._beyond_ledger:
            return self._beyond_ledger[size]
        known = sorted(self._beyond_ledger.items())[-2:]
        if not known:
            return 0
        last_size, last_bytes = known[-1]
        if len(known) == 1:
            return last_bytes * max(size, last_size) // last_size
        rise = max(0.0, (last_bytes - known[0][1]) / (last_size - known[0][0]))
        return last_bytes + int(rise * max(0, size - last_size))

    # ------------------------------------------------------------------ the same state for each

    def _restore(self, with_gradients: bool) -> None:
        """Set everything back, but keep the gradients that an earlier chunk has made if they are wanted."""
        parameters = [*self._runner.model.parameters()] if with_gradients else []
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._has_gradients = self._has_gradients and with_gradients
        restore(self._snapshot)
        for parameter, gradient in gradients:
            if parameter.grad is None:
                parameter.grad = gradient


def _gradient_bytes(model: torch.nn.Module) -> int:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    storages = {storage_key(storage): storage for gradient in gradients for storage in storages_of(gradient)}
    return sum(storage.nbytes() for storage in storages.values())
