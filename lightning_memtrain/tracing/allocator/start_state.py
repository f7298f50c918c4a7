"""What an allocator held when the recording of its events began.

Torch keeps the last events, and its segments and blocks at the end, not at the beginning. Undoing the events
from the end gives the beginning, except for one thing: a block that was there before and freed meanwhile is
known by the bytes that were asked for, not by those it had. It had more, at most 1 MiB, where its rest was
not split off. What is between it and the next block tells, or the first allocation that was put there; where
neither does, nothing more is assumed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_memtrain.tracing.allocator.events import (
    ALLOC,
    ALLOCATED,
    AWAITING_FREE,
    FREE_COMPLETED,
    FREE_REQUESTED,
    INACTIVE,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    AllocatorEvent,
    BlockRecord,
    SegmentRecord,
)
from lightning_memtrain.tracing.allocator.settings import (
    LARGE_SEGMENT_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorSettings,
)


@dataclass
class _Segment:
    """A segment that is being undone.

    Args:
        address: where it begins.
        size: its bytes.
        stream: its stream.
        small: whether it is of the small pool.
        expandable: whether it is a range of mapped pages.
    """

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass
class _Block:
    """A block that is being undone; ``size`` is ``None`` as long as only the requested bytes are known."""

    address: int
    requested: int
    state: str
    size: int | None = None


def start_state(
    events: Sequence[AllocatorEvent], end: Iterable[SegmentRecord], settings: AllocatorSettings
) -> tuple[SegmentRecord, ...]:
    """Undo a recording.

    Args:
        events: what happened, in order.
        end: what there was after it.
        settings: those of the allocator.

    Returns:
        What there was before it.
    """
    segments, blocks = _undone(events, end)
    inside = _by_segment(segments, blocks)
    unsure = []
    for segment, members in zip(segments, inside, strict=True):
        for position, block in enumerate(members):
            limit = segment.end if position + 1 == len(members) else members[position + 1].address
            if block.size is None and not _settle(block, limit, segment, settings):
                unsure.append((block, limit))
    _settle_by_events(unsure, events)
    return tuple(_record(segment, members) for segment, members in zip(segments, inside, strict=True))


def _undone(
    events: Sequence[AllocatorEvent], end: Iterable[SegmentRecord]
) -> tuple[list[_Segment], list[_Block]]:
    """Segments and blocks in use before the first event, by address."""
    segments: dict[int, _Segment] = {}
    blocks: dict[int, _Block] = {}
    for record in end:
        segments[record.address] = _Segment(*record[:5])
        for block in record.blocks:
            if block.state != INACTIVE:
                blocks[block.address] = _Block(block.address, block.requested_size, block.state, block.size)
    for action, address, size, stream in reversed(events):
        if action == ALLOC:
            blocks.pop(address, None)
        elif action == FREE_COMPLETED:
            blocks[address] = _Block(address, size, AWAITING_FREE)
        elif action == FREE_REQUESTED:
            if address in blocks:
                blocks[address].state = ALLOCATED
        elif action == SEGMENT_ALLOC:
            segments.pop(address, None)
        elif action == SEGMENT_FREE:
            segments[address] = _Segment(address, size, stream, size == SMALL_SEGMENT_BYTES, False)
        elif action == SEGMENT_MAP:
            _unmap(segments, address, size)
        elif action == SEGMENT_UNMAP:
            _map(segments, address, size, stream)
    return sorted(segments.values(), key=lambda one: one.address), list(blocks.values())


def _unmap(segments: dict[int, _Segment], address: int, size: int) -> None:
    """Cut pages out of the range that they are a part of."""
    whole = next((one for one in segments.values() if one.address <= address < one.end), None)
    if whole is None:
        return
    del segments[whole.address]
    for begin, stop in ((whole.address, address), (address + size, whole.end)):
        if begin < stop:
            segments[begin] = _Segment(begin, stop - begin, whole.stream, whole.small, True)


def _map(segments: dict[int, _Segment], address: int, size: int, stream: int) -> None:
    """Put pages beside the ranges that they touch."""
    ranges = [one for one in segments.values() if one.expandable and one.stream == stream]
    nearest = min(ranges, key=lambda one: abs(one.address - address), default=None)
    small = size % LARGE_SEGMENT_BYTES != 0 or (nearest is not None and nearest.small)
    merged = _Segment(address, size, stream, small, True)
    for one in ranges:
        if one.small == small and (one.end == merged.address or one.address == merged.end):
            del segments[one.address]
            merged.address, merged.size = min(one.address, merged.address), one.size + merged.size
    segments[merged.address] = merged


def _by_segment(segments: list[_Segment], blocks: list[_Block]) -> list[list[_Block]]:
    """The blocks of each segment, in order; a block of no segment is left out."""
    starts = [segment.address for segment in segments]
    inside: list[list[_Block]] = [[] for _ in segments]
    for block in sorted(blocks, key=lambda one: one.address):
        position = bisect_right(starts, block.address) - 1
        if position >= 0 and block.address < segments[position].end:
            inside[position].append(block)
    return inside


def _settle(block: _Block, limit: int, segment: _Segment, settings: AllocatorSettings) -> bool:
    """Give a block its size, for now if it is unsure: it may have had up to 1 MiB more."""
    least = settings.block_bytes(block.requested)
    gap = limit - block.address - least
    if not settings.splits(least, gap, small=segment.small):
        block.size = least + gap  # too little to have been split off, or to be a free block
        return True
    block.size = least
    return segment.small or settings.expandable_segments


def _settle_by_events(unsure: list[tuple[_Block, int]], events: Sequence[AllocatorEvent]) -> None:
    """Where something was put behind a block while it was in use, that is where it ended."""
    by_address = {block.address: (block, limit) for block, limit in unsure}
    starts = sorted(by_address)
    for action, address, _, _ in events:
        if action == FREE_COMPLETED:
            if by_address.pop(address, None) is not None:
                starts.remove(address)
        elif action == ALLOC:
            position = bisect_right(starts, address) - 1
            if position < 0:
                continue
            block, limit = by_address[starts[position]]
            if not block.address < address < limit:
                continue
            assert block.size is not None
            if 0 <= address - block.address - block.size <= SMALL_BYTES:
                block.size = address - block.address
            del by_address[starts.pop(position)]


def _record(segment: _Segment, members: list[_Block]) -> SegmentRecord:
    """The segment with all its blocks, the free ones between those in use."""
    records: list[BlockRecord] = []
    address = segment.address
    for block in members:
        assert block.size is not None
        if address < block.address:
            records.append(BlockRecord(address, block.address - address, 0, INACTIVE))
        records.append(BlockRecord(block.address, block.size, block.requested, block.state))
        address = block.address + block.size
    if address < segment.end:
        records.append(BlockRecord(address, segment.end - address, 0, INACTIVE))
    head = (segment.address, segment.size, segment.stream, segment.small, segment.expandable)
    return SegmentRecord(*head, tuple(records))
