"""What ordinary and expandable segments share: free blocks, what is reserved of the device, who is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lightning_memtrain.core import MIB
from lightning_memtrain.tracing.allocator.blocks import Block, FreeBlocks
from lightning_memtrain.tracing.allocator.events import AllocatorEvent
from lightning_memtrain.tracing.allocator.settings import round_up


class Driver(Protocol):
    """Gives addresses, as the device's driver does."""

    def segment(self, num_bytes: int) -> int:
        """Where a new segment of this size begins."""

    def address_range(self) -> int:
        """Where a range of addresses for a new expandable segment begins."""


class AscendingDriver:
    """Gives each segment the addresses after those of the one before.

    Only the order of addresses matters, and only between free blocks of one size.
    """

    _GRAIN_BYTES = 2 * MIB
    # More than any device has; the address space of a process holds thousands of such ranges.
    _RANGE_BYTES = 2**46

    def __init__(self) -> None:
        self._next_segment = self._GRAIN_BYTES
        self._next_range = self._RANGE_BYTES

    def segment(self, num_bytes: int) -> int:
        """Where a new segment of this size begins."""
        address = self._next_segment
        self._next_segment += round_up(num_bytes, self._GRAIN_BYTES)
        return address

    def address_range(self) -> int:
        """Where a range of addresses for a new expandable segment begins."""
        address = self._next_range
        self._next_range += self._RANGE_BYTES
        return address


class Heap:
    """Free and unmapped blocks by pool and stream, and the reserved bytes.

    Args:
        limit_bytes: most bytes that may be reserved at once, ``None`` for any.
        driver: gives addresses.
        observer: is told of each event.
    """

    def __init__(
        self,
        limit_bytes: int | None,
        driver: Driver,
        observer: Callable[[AllocatorEvent], None] | None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.driver = driver
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self._observer = observer
        self._free: dict[tuple[bool, int], FreeBlocks] = {}
        self._unmapped: dict[tuple[bool, int], list[Block]] = {}

    def free(self, small: bool, stream: int) -> FreeBlocks:
        """The free blocks of a pool and a stream."""
        try:
            return self._free[small, stream]
        except KeyError:
            return self._free.setdefault((small, stream), FreeBlocks())

    def unmapped(self, small: bool, stream: int) -> list[Block]:
        """The ranges of addresses of a pool and a stream that have no memory."""
        return self._unmapped.setdefault((small, stream), [])

    def all_free(self) -> list[Block]:
        """Every free block: those of the large pool first, by stream, smallest first."""
        return [block for key in sorted(self._free) for block in self._free[key]]

    def add(self, block: Block) -> None:
        """Enter a block that nobody uses, merged with its neighbours where these are like it."""
        for neighbour in (block.prev, block.next):
            if neighbour is not None and neighbour.is_free and neighbour.mapped == block.mapped:
                self.remove(neighbour)
                block.absorb(neighbour)
        if block.mapped:
            self.free(block.small, block.stream).add(block)
        else:
            self.unmapped(block.small, block.stream).append(block)

    def remove(self, block: Block) -> None:
        """Take out a free or unmapped block."""
        if block.mapped:
            self.free(block.small, block.stream).remove(block)
        else:
            self.unmapped(block.small, block.stream).remove(block)

    def reserve(self, num_bytes: int) -> bool:
        """Take memory of the device, if it has as much."""
        reserved_bytes = self.reserved_bytes + num_bytes
        if self.limit_bytes is not None and reserved_bytes > self.limit_bytes:
            return False
        self.reserved_bytes = reserved_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved_bytes)
        return True

    def notify(self, action: str, address: int, size: int, stream: int) -> None:
        """Tell the observer."""
        if self._observer is not None:
            self._observer(AllocatorEvent(action, address, size, stream))
