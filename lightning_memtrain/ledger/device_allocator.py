"""The peak that the device's own allocator reports, which the ledger is laid beside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memtrain.compat.torch_private import (
    can_ask_for_cpu_events,
    disable_profiler_legacy,
    enable_profiler_legacy,
    profiler_enabled,
)
from lightning_memtrain.core.arguments.value_checks import as_device


@dataclass(frozen=True)
class AllocatorReading:
    """The allocator's figures between :meth:`AllocatorStatistics.start` and :meth:`AllocatorStatistics.stop`.

    Args:
        peak_bytes: most bytes that were allocated at once.
        over_start_bytes: the part of the peak beyond what was allocated at the start.
        reserved_bytes: most bytes that the allocator had taken from the device; ``None`` if none ahead.
        num_alloc_retries: how often the allocator gave its cache back to go on; ``None`` likewise.
    """

    peak_bytes: int
    over_start_bytes: int
    reserved_bytes: int | None = None
    num_alloc_retries: int | None = None


class AllocatorStatistics(ABC):
    """Reads the peak of one device's allocator over a stretch of the program."""

    #: The allocator rounds every block up to a multiple of this.
    granularity_bytes: int = 1

    @abstractmethod
    def start(self) -> None:
        """Begin a stretch; the peak before it is forgotten."""

    @abstractmethod
    def stop(self, start_bytes: int = 0, end_bytes: int | None = None) -> AllocatorReading | None:
        """End the stretch that :meth:`start` began, and read its peak.

        Args:
            start_bytes: bytes that were live at the start, for a device that counts changes only.
            end_bytes: bytes that are live now, for a device that can check its changes by them.

        Returns:
            The figures, or ``None`` if they could not be taken this time.
        """


class AcceleratorStatistics(AllocatorStatistics):
    """Peak counters of an accelerator's caching allocator, reset at every start.

    The counters belong to the whole process: other readers of the same peak see it reset.

    Args:
        device: the accelerator, e.g. ``torch.device("cuda", 0)``.
    """

    granularity_bytes = 512

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = _memory_api(device)
        self._start_bytes = 0
        self._start_retries = 0

    def start(self) -> None:
        """Begin a stretch; the device's peak counters are reset."""
        self._memory.reset_peak_memory_stats(self._device)
        self._start_bytes = self._memory.memory_allocated(self._device)
        self._start_retries = self._num_alloc_retries()

    def stop(self, start_bytes: int = 0, end_bytes: int | None = None) -> AllocatorReading:
        """End the stretch; its counters are absolute and need no bytes to start from.

        Args:
            start_bytes: not needed.
            end_bytes: not needed.

        Returns:
            The figures of the device's allocator.
        """
        peak_bytes = self._memory.max_memory_allocated(self._device)
        return AllocatorReading(
            peak_bytes=peak_bytes,
            over_start_bytes=peak_bytes - self._start_bytes,
            reserved_bytes=self._memory.max_memory_reserved(self._device),
            num_alloc_retries=self._num_alloc_retries() - self._start_retries,
        )

    def _num_alloc_retries(self) -> int:
        return int(self._memory.memory_stats(self._device).get("num_alloc_retries", 0))


#: A reading of the CPU's allocator is off by no more than its peak over this.
CPU_TOLERANCE = 10_000


class CpuStatistics(AllocatorStatistics):
    """Every allocation and release of the CPU allocator, as seen by torch's own profiler.

    Uses the profiler without Kineto, which counts the same events and prints nothing. Its events begin at
    the start, so what was live before must be given when the stretch ends. Other threads (data loading) are
    not seen.

    The release of a block that was allocated outside of any stretch is missing from the events, or, if its
    address was in use in an earlier stretch, comes with the size of that time. Either shows when the changes
    do not lead from the bytes at the start to those at the end. A few scalars are no matter; a stretch that
    misses the end by more than one part in :data:`CPU_TOLERANCE` of its peak has no reading.
    """

    def __init__(self) -> None:
        self._running = False

    def start(self) -> None:
        """Begin to record; does nothing while another profiler records in this thread."""
        if profiler_enabled():
            return
        from lightning_memtrain.compat.torch_private import (
            ExperimentalProfilerConfig,
            ProfilerConfig,
            ProfilerState,
        )

        shapes, memory, stack, flops, modules = False, True, False, False, False
        config = ProfilerConfig(
            ProfilerState.CPU, shapes, memory, stack, flops, modules, ExperimentalProfilerConfig()
        )
        enable_profiler_legacy(config)
        self._running = True

    def stop(self, start_bytes: int = 0, end_bytes: int | None = None) -> AllocatorReading | None:
        """End the recording and add its allocations and releases up.

        Args:
            start_bytes: bytes that were live when it began.
            end_bytes: bytes that are live now; ``None`` to do without the check.

        Returns:
            The peak, or ``None`` if another profiler was running, or the events do not lead to ``end_bytes``.
        """
        if not self._running:
            return None
        self._running = False
        held = peak = 0
        events: Any = disable_profiler_legacy()
        for thread in events:
            for event in thread:
                if event.kind() == "memory_alloc":
                    held += event.cpu_memory_usage()
                    peak = max(peak, held)
        missed_bytes = 0 if end_bytes is None else abs(start_bytes + held - end_bytes)
        if missed_bytes * CPU_TOLERANCE > start_bytes + peak:
            return None
        return AllocatorReading(peak_bytes=start_bytes + peak, over_start_bytes=peak)


def allocator_statistics(device: torch.device | str) -> AllocatorStatistics | None:
    """The allocator's figures for a device.

    Args:
        device: the device that is trained on.

    Returns:
        A reader, or ``None`` for a device without any (``meta``, or an accelerator that keeps no peak).
    """
    device = as_device("allocator_statistics", device=device)
    if device.type == "cpu":
        return CpuStatistics() if can_ask_for_cpu_events() else None
    return AcceleratorStatistics(device) if _memory_api(device) is not None else None


def _memory_api(device: torch.device) -> Any:
    """The module that speaks for this device's allocator: its own, else ``torch.accelerator``."""
    if device.type in ("cpu", "meta"):
        return None
    own = getattr(torch, device.type, None)
    if hasattr(own, "max_memory_allocated"):
        return own
    generic = getattr(torch, "accelerator", None)
    if generic is not None and hasattr(generic, "max_memory_allocated") and generic.is_available():
        return generic if generic.current_accelerator().type == device.type else None
    return None
