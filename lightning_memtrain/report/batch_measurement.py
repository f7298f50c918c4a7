"""One batch between two hooks: the ledger and the device's allocator, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_memtrain.coordination import watch_asides
from lightning_memtrain.core import MemoryBreakdown
from lightning_memtrain.ledger import AllocatorStatistics, MemoryLedger, Survivor
from lightning_memtrain.ledger.operators.predicted_statistics import PredictedStatistics
from lightning_memtrain.report.stacks.stack_recorder import KnownLines, StackRecorder


@dataclass(frozen=True)
class MeasuredBatch:
    """What one batch, or one step of several batches, used.

    Args:
        breakdown: where the bytes went, with the allocator's peak; ``None`` if the ledger was off.
        allocator_peak_bytes: the allocator's peak, ``None`` if it is not known.
        survivors: what was left behind.
    """

    breakdown: MemoryBreakdown | None = None
    allocator_peak_bytes: int | None = None
    survivors: tuple[Survivor, ...] = ()

    @property
    def peak_bytes(self) -> int | None:
        """The peak from the best source there is: the allocator, the ledger, none."""
        if self.breakdown is not None and self.allocator_peak_bytes is None:
            return self.breakdown.peak_bytes
        return self.allocator_peak_bytes

    def __add__(self, other: MeasuredBatch) -> MeasuredBatch:
        """Both one after the other: the higher peak counts, and all that was left behind."""
        breakdowns = [part.breakdown for part in (self, other) if part.breakdown is not None]
        peaks = [part.allocator_peak_bytes for part in (self, other) if part.allocator_peak_bytes is not None]
        return MeasuredBatch(
            breakdown=max(breakdowns, key=lambda breakdown: breakdown.peak_bytes, default=None),
            allocator_peak_bytes=max(peaks, default=None),
            survivors=self.survivors + other.survivors,
        )


class BatchMeasurement:
    """Measures one batch from :meth:`start` until :meth:`finish`, by a ledger, the allocator or both.

    Whoever starts it abandons it in the end, whatever happened; after :meth:`finish` that does nothing. What
    runs in it but is no part of the step (probes) is left out: the allocator is read from there on only.

    Args:
        allocator: reader of the allocator's peak, or ``None`` to do without.
        ledger: a ledger that was not entered yet, or ``None`` to do without.
        stacks: lines of code that have made storages, to be noted beside the ledger; ``None`` for none.
    """

    def __init__(
        self,
        allocator: AllocatorStatistics | None,
        ledger: MemoryLedger | None,
        stacks: KnownLines | None = None,
    ) -> None:
        self._allocator = allocator
        self._ledger = ledger
        self._stacks = None if stacks is None or ledger is None else StackRecorder(ledger, stacks)
        self._reading_since: int | None = None
        self._unwatch: Callable[[], None] | None = None

    @classmethod
    def with_ledger(
        cls,
        allocator: AllocatorStatistics | None,
        model: nn.Module,
        optimizers: Sequence[Any],
        batch: Any,
        device: torch.device,
        held: Sequence[torch.Tensor] = (),
        stacks: KnownLines | None = None,
    ) -> BatchMeasurement:
        """A measurement of one batch by a ledger of its own.

        Args:
            allocator: reader of the allocator's peak, or ``None`` to do without.
            model: the module that is trained.
            optimizers: its optimizers; those that are no torch optimizers (DeepSpeed's) are left out.
            batch: the batch, of any kind.
            device: the device whose storages are counted.
            held: what else is live on it.
            stacks: lines of code that have made storages, to be noted; ``None`` for none.

        Returns:
            The measurement, not started yet.
        """
        torch_optimizers = [optimizer for optimizer in optimizers if isinstance(optimizer, Optimizer)]
        if not isinstance(allocator, PredictedStatistics):
            ledger = MemoryLedger(model, torch_optimizers, batch, device=device, held=held)
            return cls(allocator, ledger, stacks)
        ledger = MemoryLedger(
            model, torch_optimizers, batch, device=device, held=held, workspace=allocator.workspace
        )
        allocator.predicted_peak_bytes = lambda: ledger.predicted_peak_bytes
        return cls(allocator, ledger)

    def start(self) -> None:
        """Begin to measure: the allocator's peak is reset, and the ledger entered."""
        if self._ledger is not None:
            self._ledger.__enter__()
        if self._stacks is not None:
            self._stacks.begin()
        if self._allocator is not None:
            self._allocator.start()
        if self._allocator is not None or self._stacks is not None:
            self._unwatch = watch_asides(self._pause, self._resume)

    def annotate(self, name: str) -> None:
        """Put an event on the ledger's timeline, if the ledger is on."""
        if self._ledger is not None:
            self._ledger.annotate(name)

    def _pause(self) -> None:
        if self._stacks is not None:
            self._stacks.begin_aside()
        # Whatever is aside may read the allocator itself.
        if self._allocator is not None:
            self._allocator.stop()

    def _resume(self) -> None:
        if self._stacks is not None:
            self._stacks.end_aside()
        if self._allocator is not None:
            self._allocator.start()
            self._reading_since = self._ledger.tick if self._ledger is not None else None

    def finish(self, *, per_module: bool, timeline: bool) -> MeasuredBatch:
        """End the measurement and say what was held.

        Args:
            per_module: whether to make the breakdown's rows per module.
            timeline: whether to make the breakdown's rows per event.

        Returns:
            What was measured.
        """
        ledger, self._ledger = self._ledger, None
        breakdown: MemoryBreakdown | None = None
        survivors: tuple[Survivor, ...] = ()
        stacks = self._end_stacks()
        if ledger is not None:
            ledger.__exit__(None, None, None)
            breakdown = ledger.breakdown(per_module=per_module, timeline=timeline, with_asides=False)
            survivors = ledger.survivors()
            if stacks is not None:
                breakdown = replace(breakdown, sites=stacks.sites())
        allocator = self._take_allocator()
        ends: tuple[int, ...] = ()
        if ledger is not None and breakdown is not None:
            since = self._reading_since
            start_bytes = breakdown.start_bytes if since is None else ledger.bytes_at(since)
            ends = start_bytes, breakdown.end_bytes
        reading = allocator.stop(*ends) if allocator is not None else None
        peak_bytes = reading.peak_bytes if reading is not None else None
        if breakdown is not None and reading is not None:
            breakdown = breakdown.with_allocator_peak(
                peak_bytes,
                reserved_bytes=reading.reserved_bytes,
                num_alloc_retries=reading.num_alloc_retries,
            )
        return MeasuredBatch(breakdown, peak_bytes, survivors)

    def abandon(self) -> None:
        """End whatever is still going on and throw it away."""
        allocator = self._take_allocator()
        if allocator is not None:
            allocator.stop()
        self._end_stacks()
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.__exit__(None, None, None)

    def _end_stacks(self) -> StackRecorder | None:
        stacks, self._stacks = self._stacks, None
        if stacks is not None:
            stacks.end()
        return stacks

    def _take_allocator(self) -> AllocatorStatistics | None:
        allocator, self._allocator = self._allocator, None
        if self._unwatch is not None:
            self._unwatch()
        return allocator
