"""What happens in a caching allocator, in torch's own words, and what it holds at one moment."""

from __future__ import annotations

from typing import NamedTuple

ALLOC = "alloc"
# The owner let go of the block; on one stream the next event says that it is free.
FREE_REQUESTED = "free_requested"
FREE_COMPLETED = "free_completed"
SEGMENT_ALLOC = "segment_alloc"
SEGMENT_FREE = "segment_free"
# Pages of an expandable segment.
SEGMENT_MAP = "segment_map"
SEGMENT_UNMAP = "segment_unmap"
OUT_OF_MEMORY = "oom"

TAKES = frozenset({SEGMENT_ALLOC, SEGMENT_MAP})
GIVES_BACK = frozenset({SEGMENT_FREE, SEGMENT_UNMAP})

# States of a block.
ALLOCATED = "active_allocated"
# Its owner let go of it, but another stream may still use it.
AWAITING_FREE = "active_pending_free"
INACTIVE = "inactive"


class AllocatorEvent(NamedTuple):
    """One action of the allocator.

    Args:
        action: one of the names above.
        address: of the block or segment; 0 for ``oom``.
        size: bytes that were asked for (``alloc``, ``free_*``, ``oom``), or those of the segment or pages.
        stream: the stream that it belongs to.
    """

    action: str
    address: int
    size: int
    stream: int = 0


class BlockRecord(NamedTuple):
    """A part of a segment.

    Args:
        address: where it begins.
        size: its bytes.
        requested_size: bytes of them that were asked for; of no meaning where it is free.
        state: one of the names above.
    """

    address: int
    size: int
    requested_size: int
    state: str


class SegmentRecord(NamedTuple):
    """Memory that the allocator has from the device: one ``cudaMalloc``, or one range of mapped pages.

    Args:
        address: where it begins.
        size: its bytes.
        stream: the stream that its blocks are for.
        small: whether it belongs to the small pool.
        expandable: whether it is a range of mapped pages.
        blocks: its parts, in order and without gaps.
    """

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    blocks: tuple[BlockRecord, ...]
