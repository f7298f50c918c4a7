"""A recording of a real allocator, made again by the model and compared with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_memtrain.tracing.allocator.caching_allocator import CachingAllocator
from lightning_memtrain.tracing.allocator.events import (
    ALLOC,
    FREE_COMPLETED,
    FREE_REQUESTED,
    GIVES_BACK,
    SEGMENT_ALLOC,
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
        self.segments: deque[tuple[int, int]] = deque()
        self.ranges: deque[int] = deque()

    def segment(self, num_bytes: int) -> int:
        for taken in self.segments:
            if taken[1] == num_bytes:
                self.segments.remove(taken)
                return taken[0]
        return super().segment(num_bytes)

    def address_range(self) -> int:
        return self.ranges.popleft() if self.ranges else super().address_range()


class Replay:
    """Lets the model do what a real allocator was recorded to do, event by event.

    The model is told what was asked for and let go of, and when memory went back to the device, which happens
    when the device is full. Where blocks lie, when segments are taken and which go back is its own doing.

    Args:
        events: the recording of one device, in order.
        end: what there was after it.
        settings: those of the real allocator, ``None`` for torch's defaults.
        observer: is told what the model does.
    """

    def __init__(
        self,
        events: Sequence[AllocatorEvent],
        end: Iterable[SegmentRecord],
        settings: AllocatorSettings | None = None,
        *,
        observer: Callable[[AllocatorEvent], None] | None = None,
    ) -> None:
        settings = AllocatorSettings() if settings is None else settings
        self.start = start_state(events, end, settings)
        self._driver = _RecordedDriver()
        self.allocator = CachingAllocator(settings, driver=self._driver, observer=observer)
        # The model's blocks by their real addresses.
        self.blocks = self.allocator.restore(self.start)
        self.real_reserved_bytes = sum(segment.size for segment in self.start)
        self._real_peak_bytes = self.real_reserved_bytes
        self._num_events = self._num_allocations = self._num_same = 0
        self._giving_back = False

    def step(self, event: AllocatorEvent) -> None:
        """Let the model do the next thing."""
        action, address, size, stream = event
        self._num_events += 1
        if action == ALLOC:
            self._num_allocations += 1
            self.blocks[address] = block = self.allocator.allocate(size, stream)
            self._num_same += block.address == address
            self._driver.ranges.clear()  # those of this allocation were within ranges that the model has
        elif action == FREE_REQUESTED:
            if address in self.blocks:
                self.allocator.request_free(self.blocks[address])
        elif action == FREE_COMPLETED:
            if address in self.blocks:
                self.allocator.complete_free(self.blocks.pop(address))
        elif action in TAKES:
            self.real_reserved_bytes += size
            self._real_peak_bytes = max(self._real_peak_bytes, self.real_reserved_bytes)
            if action == SEGMENT_ALLOC:
                self._driver.segments.append((address, size))
            else:
                self._driver.ranges.append(address)
        elif action in GIVES_BACK:
            self.real_reserved_bytes -= size
            if not self._giving_back:  # all at once
                self.allocator.empty_cache()
        self._giving_back = action in GIVES_BACK

    @property
    def comparison(self) -> Comparison:
        """How the model has done so far."""
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
    events: Sequence[AllocatorEvent], end: Iterable[SegmentRecord], settings: AllocatorSettings | None = None
) -> Comparison:
    """Compare the model with a whole recording; see `Replay`.

    Args:
        events: the recording of one device, in order.
        end: what there was after it.
        settings: those of the real allocator, ``None`` for torch's defaults.

    Returns:
        The comparison.
    """
    run = Replay(events, end, settings)
    for event in events:
        run.step(event)
    return run.comparison
