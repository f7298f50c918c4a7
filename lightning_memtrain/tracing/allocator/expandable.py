"""Expandable segments: one range of addresses per pool and stream, with memory mapped into it page by page.

See the note on expandable segments in ``c10/cuda/CUDACachingAllocator.cpp``.
"""

from __future__ import annotations

from lightning_memtrain.tracing.allocator.blocks import Block
from lightning_memtrain.tracing.allocator.events import SEGMENT_MAP, SEGMENT_UNMAP
from lightning_memtrain.tracing.allocator.heap import Heap
from lightning_memtrain.tracing.allocator.settings import page_bytes, round_up

# Torch takes 9/8 of the device's memory; a range that is never used up keeps that out of the model.
RANGE_BYTES = 2**45


class ExpandableSegments:
    """Maps memory behind addresses and takes it away again.

    Args:
        heap: where the blocks are entered.
    """

    def __init__(self, heap: Heap) -> None:
        self._heap = heap

    def take(self, size: int, small: bool, stream: int) -> Block | None:
        """Make a free block of at least ``size`` bytes, at the lowest address where there is room for it.

        Args:
            size: bytes of the block.
            small: which pool.
            stream: which stream.

        Returns:
            The block, no longer among the free ones; ``None`` if the device has no more memory.
        """
        block = self._room(size, small, stream)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            after = block.next
            assert after is not None  # or there would be no room
            if not self._map(after, min(size - block.size, after.size)):
                return None
            block = after  # it has absorbed the block before it
        self._heap.remove(block)
        return block

    def unmap(self, block: Block) -> None:
        """Give back the pages that lie within a free block."""
        assert block.base is not None
        page = page_bytes(small=block.small)
        begin = block.base + round_up(block.address - block.base, page)
        end = block.end - (block.end - block.base) % page
        if begin >= end:
            return
        self._heap.remove(block)
        if block.address < begin:
            before, block = block, block.split(begin - block.address)
            self._heap.free(before.small, before.stream).add(before)
        if end < block.end:
            after = block.split(end - block.address)
            self._heap.free(after.small, after.stream).add(after)
        block.mapped = False
        self._heap.add(block)
        if not block.is_split:  # nothing is left of the segment; the next one has other addresses
            self._heap.remove(block)
        self._heap.reserved_bytes -= end - begin
        self._heap.notify(SEGMENT_UNMAP, begin, end - begin, block.stream)

    def _room(self, size: int, small: bool, stream: int) -> Block:
        """The first of some free and unmapped blocks in a row that have ``size`` bytes together."""
        for block in sorted(self._heap.unmapped(small, stream), key=lambda block: block.address):
            before = block.prev
            first = block if before is None or not before.is_free else before
            found, reached = first.size, first.next
            while found < size and reached is not None and reached.is_free:
                found, reached = found + reached.size, reached.next
            if found >= size:
                return first
        base = self._heap.driver.address_range()
        block = Block(base, RANGE_BYTES, stream, small, base, mapped=False)
        self._heap.add(block)
        return block

    def _map(self, block: Block, num_bytes: int) -> bool:
        """Put memory behind the first ``num_bytes`` of an unmapped block, in whole pages."""
        assert block.base is not None
        begin = block.address
        offset = begin - block.base
        mapped_bytes = round_up(offset + num_bytes, page_bytes(small=block.small)) - offset
        if not self._heap.reserve(mapped_bytes):
            return False
        self._heap.remove(block)
        if mapped_bytes < block.size:
            rest = block.split(mapped_bytes)
            self._heap.unmapped(rest.small, rest.stream).append(rest)
        block.mapped = True
        self._heap.add(block)
        self._heap.notify(SEGMENT_MAP, begin, mapped_bytes, block.stream)
        return True
