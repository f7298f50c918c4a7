"""What torch's caching allocator does with allocations: addresses, allocated and reserved bytes.

A pure model of ``c10/cuda/CUDACachingAllocator.cpp`` for one device; neither torch nor a device is needed. An
allocation takes the smallest free block of its pool and stream that is large enough, of equals the one at the
lowest address, and splits off the rest where that is of use. Where there is none, a segment is taken from the
device. A block that is freed merges with its free neighbours and stays reserved. Only when the device has no
more memory, or by `empty_cache`, do segments that are free as a whole go back. Not modelled are private pools
(CUDA graphs, ``MemPool``) and the settings that `AllocatorSettings` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from lightning_memtrain.core import ArgumentError, format_bytes
from lightning_memtrain.tracing.allocator.blocks import Block
from lightning_memtrain.tracing.allocator.events import (
    ALLOC,
    ALLOCATED,
    AWAITING_FREE,
    FREE_COMPLETED,
    FREE_REQUESTED,
    INACTIVE,
    OUT_OF_MEMORY,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    AllocatorEvent,
    BlockRecord,
    SegmentRecord,
)
from lightning_memtrain.tracing.allocator.expandable import RANGE_BYTES, ExpandableSegments
from lightning_memtrain.tracing.allocator.heap import AscendingDriver, Driver, Heap
from lightning_memtrain.tracing.allocator.settings import LARGE_SEGMENT_BYTES, SMALL_BYTES, AllocatorSettings


class DeviceFull(Exception):
    """The device has no memory left for an allocation, not even after all free segments went back.

    Args:
        requested_bytes: what was asked for.
        allocated_bytes: what blocks in use held.
        reserved_bytes: what all segments held.
        limit_bytes: what the allocator may have of the device.
    """

    def __init__(
        self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, limit_bytes: int
    ) -> None:
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes
        super().__init__(
            f"An allocation of {format_bytes(requested_bytes)} does not fit: of {format_bytes(limit_bytes)}, "
            f"{format_bytes(allocated_bytes)} are allocated and {format_bytes(reserved_bytes)} reserved."
        )


class CachingAllocator:
    """One device's caching allocator.

    Args:
        settings: as ``PYTORCH_CUDA_ALLOC_CONF`` would set them; ``None`` for torch's defaults.
        limit_bytes: most bytes that it can have of the device at once, ``None`` for any.
        driver: gives addresses; ``None`` for ascending ones.
        observer: is told of each action, in the words and order of torch's own recording.

    Example:
        >>> allocator = CachingAllocator()
        >>> block = allocator.allocate(3 * 2**20)
        >>> allocator.allocated_bytes, allocator.reserved_bytes
        (3145728, 20971520)
        >>> allocator.free(block)
        >>> allocator.allocated_bytes, allocator.reserved_bytes
        (0, 20971520)
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        limit_bytes: int | None = None,
        driver: Driver | None = None,
        observer: Callable[[AllocatorEvent], None] | None = None,
    ) -> None:
        self.settings = AllocatorSettings() if settings is None else settings
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0
        self.num_retries = 0
        self._heap = Heap(limit_bytes, AscendingDriver() if driver is None else driver, observer)
        self._expandable = ExpandableSegments(self._heap)
        # Allocated blocks, and those that wait for a stream.
        self._active: dict[int, Block] = {}

    @property
    def reserved_bytes(self) -> int:
        """What it has from the device."""
        return self._heap.reserved_bytes

    @property
    def limit_bytes(self) -> int | None:
        """Most that it can have of the device at once, ``None`` for any; may change at any time."""
        return self._heap.limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int | None) -> None:
        self._heap.limit_bytes = limit_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that it had from the device at once."""
        return self._heap.peak_reserved_bytes

    def allocate(self, num_bytes: int, stream: int = 0) -> Block:
        """Find a block for ``num_bytes``.

        Args:
            num_bytes: at least 1; torch asks for no block where there are none.
            stream: the stream that it is for.

        Returns:
            The block, to be handed to `free`.

        Raises:
            ArgumentError: if ``num_bytes`` is less than 1.
            DeviceFull: if the device has no more memory.
        """
        if num_bytes < 1:
            raise ArgumentError(f"`allocate(num_bytes)` must be at least 1, but got {num_bytes}.")
        size = self.settings.block_bytes(num_bytes)
        small = size <= SMALL_BYTES
        block = self._find(size, small, stream)
        if block is None:
            block = self._take_or_give_back(size, small, stream)
        if block is None:
            self._heap.notify(OUT_OF_MEMORY, 0, num_bytes, stream)
            limit_bytes = self._heap.limit_bytes
            assert limit_bytes is not None
            raise DeviceFull(num_bytes, self.allocated_bytes, self.reserved_bytes, limit_bytes)
        if self.settings.splits(size, block.size - size, small=small):
            self._heap.free(small, stream).add(block.split(size))
        block.state = ALLOCATED
        block.requested = num_bytes
        self._active[block.address] = block
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self._heap.notify(ALLOC, block.address, num_bytes, stream)
        return block

    def free(self, block: Block) -> None:
        """Free a block that no other stream uses.

        Args:
            block: what `allocate` returned.
        """
        self.request_free(block)
        self.complete_free(block)

    def request_free(self, block: Block) -> None:
        """Let go of a block that other streams may still use (``Tensor.record_stream``).

        Args:
            block: what `allocate` returned; it is no longer allocated, but not yet free.
        """
        if block.state != ALLOCATED:
            raise ValueError(
                f"`request_free(block)` must be allocated, but got a block that is {block.state}."
            )
        block.state = AWAITING_FREE
        self.allocated_bytes -= block.size
        self._heap.notify(FREE_REQUESTED, block.address, block.requested, block.stream)

    def complete_free(self, block: Block) -> None:
        """Free a block that was let go of and that no stream uses any more.

        Args:
            block: what `request_free` was given.
        """
        if block.state != AWAITING_FREE:
            raise ValueError(
                f"`complete_free(block)` must have been let go of, but got a block that is {block.state}."
            )
        del self._active[block.address]
        self._heap.notify(FREE_COMPLETED, block.address, block.requested, block.stream)
        block.state = INACTIVE
        self._heap.add(block)

    def empty_cache(self) -> None:
        """Give back all segments that are free as a whole, and the free pages of expandable ones.

        Blocks that still wait for a stream are waited for, as torch does when memory runs out.
        """
        for block in [block for block in self._active.values() if block.state == AWAITING_FREE]:
            self.complete_free(block)
        for block in self._heap.all_free():
            if block.base is not None:
                self._expandable.unmap(block)
            elif not block.is_split:
                self._give_back(block)

    def give_back_oversize(self, num_bytes: int, stream: int = 0) -> bool:
        """Give back blocks that are never split, as an allocation does for which the device has no room.

        One that is large enough, or else as many as are, largest first; none without
        :attr:`.AllocatorSettings.max_split_size_bytes`.

        Args:
            num_bytes: of the allocation.
            stream: its stream.

        Returns:
            Whether they are enough for it.
        """
        size = self.settings.block_bytes(num_bytes)
        return self._give_back_oversize(size, size <= SMALL_BYTES, stream)

    def largest_free_bytes(self, num_bytes: int, stream: int = 0) -> int:
        """How large a free block is that an allocation could have had, if it were large enough.

        Args:
            num_bytes: of the allocation; they decide on its pool.
            stream: its stream.

        Returns:
            Bytes of the largest free block, 0 if there is none.
        """
        small = self.settings.block_bytes(num_bytes) <= SMALL_BYTES
        return max((block.size for block in self._heap.free(small, stream)), default=0)

    def segments(self) -> tuple[SegmentRecord, ...]:
        """All that it has from the device, by address."""
        blocks = [*self._heap.all_free(), *self._active.values()]
        heads = [block for block in blocks if block.prev is None or not block.prev.mapped]
        return tuple(_record(head) for head in sorted(heads, key=lambda head: head.address))

    def restore(self, segments: Iterable[SegmentRecord]) -> dict[int, Block]:
        """Begin with what an allocator held at some moment.

        Args:
            segments: all that it had; mapped ranges of one pool and stream become one expandable segment.

        Returns:
            The blocks in use, by address.
        """
        ordered = sorted(segments, key=lambda segment: (_family(segment), segment.address))
        for (expandable, _, _, _), family in groupby(ordered, key=_family):
            members = list(family)
            base = members[0].address if expandable else None
            last: Block | None = None
            for segment in members:
                if last is not None and last.end < segment.address:
                    gap_bytes = segment.address - last.end
                    gap = Block(last.end, gap_bytes, last.stream, last.small, base, mapped=False)
                    last = self._append(gap, last)
                for record in segment.blocks:
                    block = Block(record.address, record.size, segment.stream, segment.small, base)
                    block.state, block.requested = record.state, record.requested_size
                    last = self._append(block, last)
                self._heap.reserve(segment.size)
            if last is not None and expandable:
                unmapped = RANGE_BYTES - (last.end - members[0].address)
                self._append(Block(last.end, unmapped, last.stream, last.small, base, mapped=False), last)
        self.peak_allocated_bytes = self.allocated_bytes
        return dict(self._active)

    def _append(self, block: Block, last: Block | None) -> Block:
        """Enter a block of a segment that is restored, after the one before it."""
        if last is not None:
            block.prev, last.next = last, block
        if block.is_free:
            self._heap.add(block)
        else:
            self._active[block.address] = block
            self.allocated_bytes += block.size if block.state == ALLOCATED else 0
        return block

    def _find(self, size: int, small: bool, stream: int) -> Block | None:
        """The free block that fits best, taken from the free ones."""
        candidates = self._heap.free(small, stream).from_size(size)
        block = next(candidates, None)
        if block is None:
            return None
        # Of expandable segments, what a block can grow to counts, so that its end stays free to grow.
        for other in candidates:
            if block.base is None or other.reach >= block.reach:
                break
            block = other
        limit = self.settings.max_split_size_bytes
        if limit is not None:
            if size < limit <= block.size:
                return None
            if limit <= size and block.size >= size + LARGE_SEGMENT_BYTES:
                return None
        self._heap.remove(block)
        return block

    def _take_or_give_back(self, size: int, small: bool, stream: int) -> Block | None:
        """Take memory of the device, after giving free memory back if that is what it takes."""
        block = self._take(size, small, stream)
        if block is None and self._give_back_oversize(size, small, stream):
            block = self._take(size, small, stream)
        if block is None:
            self.num_retries += 1
            self.empty_cache()
            block = self._take(size, small, stream)
        return block

    def _take(self, size: int, small: bool, stream: int) -> Block | None:
        if self.settings.expandable_segments:
            return self._expandable.take(size, small, stream)
        segment_bytes = self.settings.segment_bytes(size)
        if not self._heap.reserve(segment_bytes):
            return None
        block = Block(self._heap.driver.segment(segment_bytes), segment_bytes, stream, small)
        self._heap.notify(SEGMENT_ALLOC, block.address, block.size, stream)
        return block

    def _give_back(self, block: Block) -> None:
        self._heap.remove(block)
        self._heap.reserved_bytes -= block.size
        self._heap.notify(SEGMENT_FREE, block.address, block.size, block.stream)

    def _give_back_oversize(self, size: int, small: bool, stream: int) -> bool:
        """Give back one block that is never split and large enough, or as many as are, largest first."""
        limit = self.settings.max_split_size_bytes
        if limit is None:
            return False
        needed = max(size, limit)
        free = self._heap.free(small, stream)
        enough = next(free.from_size(needed), None)
        chosen = [enough] if enough is not None else list(free.from_size(limit))[::-1]
        given_back = 0
        for block in chosen:
            if given_back >= needed:
                break
            given_back += block.size
            self._give_back(block)
        return given_back >= needed


def _family(segment: SegmentRecord) -> tuple[bool, bool, int, int]:
    """What is alike for segments that share a range of addresses, which ordinary ones share with none."""
    return segment.expandable, segment.small, segment.stream, 0 if segment.expandable else segment.address


def _record(head: Block) -> SegmentRecord:
    records: list[BlockRecord] = []
    block: Block | None = head
    while block is not None and block.mapped:
        records.append(block.record())
        block = block.next
    size = sum(record.size for record in records)
    return SegmentRecord(head.address, size, head.stream, head.small, head.base is not None, tuple(records))
