"""A recording of a real allocator, made again by the model and compared with it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_memtrain.tracing.allocator.blocks import Block
from lightning_memtrain.tracing.allocator.caching_allocator import CachingAllocator
from lightning_memtrain.tracing.allocator.events import (
    ALLOC,
    ALLOCATED,
    AWAITING_FREE,
    FREE_COMPLETED,
    FREE_REQUESTED,
    GIVES_BACK,
    OUT_OF_MEMORY,
    SEGMENT_ALLOC,
    SEGMENT_MAP,
    TAKES,
    AllocatorEvent,
    SegmentRecord,
)
from lightning_memtrain.tracing.allocator.heap import AscendingDriver
from lightning_memtrain.tracing.allocator.settings import AllocatorSettings
from lightning_memtrain.tracing.allocator.start_state import start_state


@dataclass(frozen=True)
class Comparison:
    """How a model's allocator did beside the real one.

    Args:
        num_events: recorded events.
        num_allocations: allocations among them.
        num_same_address: those of them that the model put at their real address.
        real_peak_reserved_bytes: most that the real one had from the device.
        model_peak_reserved_bytes: most that the model had.
        real_end_reserved_bytes: what the real one had after the last event.
        model_end_reserved_bytes: what the model had then.
        model_peak_allocated_bytes: most bytes of allocated blocks in the model.
        model_end_allocated_bytes: bytes of allocated blocks in the model after the last event.
    """

    num_events: int
    num_allocations: int
    num_same_address: int
    real_peak_reserved_bytes: int
    model_peak_reserved_bytes: int
    real_end_reserved_bytes: int
    model_end_reserved_bytes: int
    model_peak_allocated_bytes: int
    model_end_allocated_bytes: int

    @property
    def same_address_share(self) -> float:
        """Share of allocations at their real address; 1 where there are none."""
        return self.num_same_address / self.num_allocations if self.num_allocations else 1.0


class _RecordedDriver(AscendingDriver):
    """Gives the addresses that the real driver gave, and others where the model asks for something else.

    Where ``cudaMalloc`` puts a segment cannot be known beforehand; it is an input of the replay.
    """

    # Beyond all addresses of a process, so that they cannot be taken for real ones.
    _FIRST = 2**56

    def __init__(self) -> None:
        super().__init__()
        self._next_segment += self._FIRST
        self._next_range += 2 * self._FIRST
        # What the real driver gave and the model has not asked for yet.
        self.segments: deque[tuple[int, int]] = deque()
        self.ranges: deque[int] = deque()
        # What the model has, by where it begins.
        self._begins: list[int] = []
        self._ends: dict[int, int] = {}

    def segment(self, num_bytes: int) -> int:
        for taken in self.segments:
            # A model that went another way may still have what the real one had given back.
            if taken[1] == num_bytes and self._is_free(*taken):
                self.segments.remove(taken)
                return taken[0]
        return super().segment(num_bytes)

    def address_range(self) -> int:
        while self.ranges:
            if self._is_free(address := self.ranges.popleft(), 1):
                return address
        return super().address_range()

    def note(self, event: AllocatorEvent) -> None:
        """Keep account of what the model has."""
        if event.action in TAKES and event.address not in self._ends:
            insort(self._begins, event.address)
            self._ends[event.address] = event.address + event.size
        elif event.action in GIVES_BACK and self._ends.pop(event.address, None) is not None:
            del self._begins[bisect_left(self._begins, event.address)]

    def _is_free(self, address: int, num_bytes: int) -> bool:
        position = bisect_left(self._begins, address + num_bytes) - 1
        return position < 0 or self._ends[self._begins[position]] <= address


def settings_of(
    events: Sequence[AllocatorEvent], end: Sequence[SegmentRecord], recorded: Mapping[str, Any]
) -> tuple[AllocatorSettings, str]:
    """The settings under which a recording was made, as far as they are known and modelled.

    Args:
        events: the recording of one device, in order.
        end: what there was after it.
        recorded: the entry ``allocator_settings`` of the snapshot, ``{}`` if it has none.

    Returns:
        The settings, and what about them is not modelled: ``""`` if all is.
    """
    settings, missing = AllocatorSettings.nearest(recorded)
    if any(segment.expandable for segment in end) or any(event.action == SEGMENT_MAP for event in events):
        settings = replace(settings, expandable_segments=True)  # not every file says so
    return settings, missing


class Replay:
    """Lets the model do what a real allocator was recorded to do, event by event.

    The model is told what was asked for and let go of, and when memory went back to the device, by
    ``empty_cache`` or because it was full. Where blocks lie, when segments are taken and which go back is its
    own doing.

    Args:
        events: the recording of one device, in order.
        end: what there was after it.
        settings: those of the real allocator, ``None`` for torch's defaults.
        limit_bytes: most bytes that the allocator could have had of the device. If it is given, the model is
            not told when memory went back, but finds out by itself when the device is full.
    """

    def __init__(
        self,
        events: Sequence[AllocatorEvent],
        end: Iterable[SegmentRecord],
        settings: AllocatorSettings | None = None,
        *,
        limit_bytes: int | None = None,
    ) -> None:
        settings = AllocatorSettings() if settings is None else settings
        self.start = start_state(events, end, settings)
        self._driver = _RecordedDriver()
        for segment in self.start:
            self._driver.note(AllocatorEvent(SEGMENT_ALLOC, segment.address, segment.size))
        self.allocator = CachingAllocator(
            settings, limit_bytes=limit_bytes, driver=self._driver, observer=self._driver.note
        )
        self._is_told = limit_bytes is None
        # The model's blocks by their real addresses.
        self.blocks = self.allocator.restore(self.start)
        self.real_reserved_bytes = sum(segment.size for segment in self.start)
        self._real_peak_bytes = self.real_reserved_bytes
        self._num_events = self._num_allocations = self._num_same = 0
        # What the real one gave back in a row, and the model has not yet.
        self._given_back_bytes = 0

    def step(self, event: AllocatorEvent) -> None:
        """Let the model do the next thing."""
        action, address, size, stream = event
        self._num_events += 1
        if action not in (*TAKES, *GIVES_BACK):
            self._give_back(event)
        if action == ALLOC:
            self._num_allocations += 1
            self.blocks[address] = block = self.allocator.allocate(size, stream)
            self._num_same += block.address == address
            self._driver.ranges.clear()  # those of this allocation were within ranges that the model has
        elif action == FREE_REQUESTED and address in self.blocks:
            self._let_go(self.blocks[address])
        elif action == FREE_COMPLETED and address in self.blocks:
            block = self.blocks.pop(address)
            self._let_go(block)
            # Where memory ran out, the model has already freed what waited.
            if block.state == AWAITING_FREE:
                self.allocator.complete_free(block)
        elif action in TAKES:
            self.real_reserved_bytes += size
            self._real_peak_bytes = max(self._real_peak_bytes, self.real_reserved_bytes)
            if action == SEGMENT_ALLOC:
                self._driver.segments.append((address, size))
            else:
                self._driver.ranges.append(address)
        elif action in GIVES_BACK:
            self.real_reserved_bytes -= size
            self._given_back_bytes += size

    def _give_back(self, event: AllocatorEvent | None) -> None:
        """Let the model give back memory, if the real one just has; for what, the next event tells.

        All that is free goes back at once, but where some blocks are never split: then a new block may need
        only those.
        """
        given_back, self._given_back_bytes = self._given_back_bytes, 0
        if not given_back or not self._is_told:
            return
        before = self.allocator.reserved_bytes
        if event is not None and event.action in (ALLOC, OUT_OF_MEMORY):
            self.allocator.give_back_oversize(event.size, event.stream)
        if before - self.allocator.reserved_bytes < given_back:
            self.allocator.empty_cache()

    def _let_go(self, block: Block) -> None:
        if block.state == ALLOCATED:
            self.allocator.request_free(block)

    @property
    def comparison(self) -> Comparison:
        """How the model has done so far."""
        self._give_back(None)
        return Comparison(
            num_events=self._num_events,
            num_allocations=self._num_allocations,
            num_same_address=self._num_same,
            real_peak_reserved_bytes=self._real_peak_bytes,
            model_peak_reserved_bytes=self.allocator.peak_reserved_bytes,
            real_end_reserved_bytes=self.real_reserved_bytes,
            model_end_reserved_bytes=self.allocator.reserved_bytes,
            model_peak_allocated_bytes=self.allocator.peak_allocated_bytes,
            model_end_allocated_bytes=self.allocator.allocated_bytes,
        )


def replay(
    events: Sequence[AllocatorEvent],
    end: Iterable[SegmentRecord],
    settings: AllocatorSettings | None = None,
    *,
    limit_bytes: int | None = None,
) -> Comparison:
    """Compare the model with a whole recording; see `Replay`.

    Args:
        events: the recording of one device, in order.
        end: what there was after it.
        settings: those of the real allocator, ``None`` for torch's defaults.
        limit_bytes: see `Replay`.

    Returns:
        The comparison.

    Raises:
        DeviceFull: if the model needs more than ``limit_bytes``.
    """
    run = Replay(events, end, settings, limit_bytes=limit_bytes)
    for event in events:
        run.step(event)
    return run.comparison
