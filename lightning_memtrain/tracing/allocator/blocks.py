"""Blocks of a segment, and the free ones in the order in which they are looked for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from lightning_memtrain.tracing.allocator.events import INACTIVE, BlockRecord


class Block:
    """A part of a segment, linked to its neighbours in it.

    Args:
        address: where it begins.
        size: its bytes.
        stream: the stream that may use it.
        small: whether it belongs to the small pool.
        base: where its expandable segment begins, ``None`` if its segment is an ordinary one.
        mapped: whether there is memory behind the addresses; always in an ordinary segment.
    """

    __slots__ = ("address", "base", "mapped", "next", "prev", "requested", "size", "small", "state", "stream")

    def __init__(
        self, address: int, size: int, stream: int, small: bool, base: int | None = None, mapped: bool = True
    ) -> None:
        self.address = address
        self.size = size
        self.stream = stream
        self.small = small
        self.base = base
        self.mapped = mapped
        self.requested = 0
        self.state = INACTIVE
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def end(self) -> int:
        """The address after the last of its bytes."""
        return self.address + self.size

    @property
    def is_split(self) -> bool:
        """Whether its segment has other blocks, too."""
        return self.prev is not None or self.next is not None

    @property
    def is_free(self) -> bool:
        """Whether nobody uses it; its addresses need not be mapped."""
        return self.state == INACTIVE

    @property
    def reach(self) -> int:
        """Bytes that it would have if the unmapped addresses after it were mapped."""
        after = self.next
        return self.size if after is None or after.mapped else self.size + after.size

    def split(self, size: int) -> Block:
        """Cut the block after ``size`` bytes.

        Args:
            size: bytes that stay with this block, fewer than it has.

        Returns:
            The rest, a free block, mapped as this one is.
        """
        rest = Block(self.address + size, self.size - size, self.stream, self.small, self.base, self.mapped)
        rest.prev, rest.next = self, self.next
        if self.next is not None:
            self.next.prev = rest
        self.next, self.size = rest, size
        return rest

    def absorb(self, other: Block) -> None:
        """Take over a neighbour, which is no block of the segment afterwards."""
        if other is self.prev:
            self.address = other.address
            self.prev = other.prev
            if self.prev is not None:
                self.prev.next = self
        else:
            self.next = other.next
            if self.next is not None:
                self.next.prev = self
        self.size += other.size

    def record(self) -> BlockRecord:
        """The block as it is now."""
        return BlockRecord(self.address, self.size, 0 if self.is_free else self.requested, self.state)


class FreeBlocks:
    """The free blocks of one pool and one stream: the smallest first, of equals the lowest address."""

    def __init__(self) -> None:
        self._order: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}

    def __iter__(self) -> Iterator[Block]:
        return iter([self._blocks[address] for _, address in self._order])

    def __len__(self) -> int:
        return len(self._order)

    def add(self, block: Block) -> None:
        """Enter a block; its size and address must not change while it is in here."""
        insort(self._order, (block.size, block.address))
        self._blocks[block.address] = block

    def remove(self, block: Block) -> None:
        """Take out a block."""
        del self._order[bisect_left(self._order, (block.size, block.address))]
        del self._blocks[block.address]

    def from_size(self, size: int) -> Iterator[Block]:
        """The blocks of at least ``size`` bytes, in order.

        Args:
            size: bytes.

        Yields:
            Each block; nothing may be entered or taken out meanwhile.
        """
        for position in range(bisect_left(self._order, (size, 0)), len(self._order)):
            yield self._blocks[self._order[position][1]]
