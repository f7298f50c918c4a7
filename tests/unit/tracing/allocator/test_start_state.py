"""What was there before a recording, from small recordings that are written out by hand."""

from __future__ import annotations

from lightning_memtrain.core import MIB
from lightning_memtrain.tracing.allocator import (
    AllocatorEvent,
    AllocatorSettings,
    BlockRecord,
    SegmentRecord,
    start_state,
)


def segment(address: int, *blocks: tuple[int, int, str], small: bool = False, expandable: bool = False):
    """A segment of blocks, each of its size, requested size and state."""
    records, end = [], address
    for size, requested, state in blocks:
        records.append(BlockRecord(end, size, requested, state))
        end += size
    return SegmentRecord(address, end - address, 0, small, expandable, tuple(records))


def used(size: int, requested: int | None = None) -> tuple[int, int, str]:
    return size, size if requested is None else requested, "active_allocated"


def unused(size: int) -> tuple[int, int, str]:
    return size, 0, "inactive"


def freed(address: int, size: int) -> list[AllocatorEvent]:
    return [AllocatorEvent("free_requested", address, size), AllocatorEvent("free_completed", address, size)]


def before(events: list[AllocatorEvent], *end: SegmentRecord, expandable: bool = False):
    return start_state(events, end, AllocatorSettings(expandable_segments=expandable))


def test_without_events_nothing_changed() -> None:
    end = segment(0, used(4 * MIB), unused(16 * MIB))
    assert before([], end) == (end,)


def test_what_was_allocated_meanwhile_was_not_there() -> None:
    end = segment(0, used(4 * MIB), used(5 * MIB), unused(11 * MIB))
    events = [AllocatorEvent("alloc", 4 * MIB, 5 * MIB)]
    assert before(events, end) == (segment(0, used(4 * MIB), unused(16 * MIB)),)


def test_what_was_freed_meanwhile_was_there() -> None:
    events = freed(0, 4 * MIB - 100)
    assert before(events, segment(0, unused(20 * MIB))) == (
        segment(0, used(4 * MIB, 4 * MIB - 100), unused(16 * MIB)),
    )


def test_a_block_that_was_freed_had_the_rest_that_is_too_small_to_be_split_off() -> None:
    end = segment(0, unused(19 * MIB), used(MIB))
    events = freed(0, 18 * MIB + 1)
    assert before(events, end) == (segment(0, used(19 * MIB, 18 * MIB + 1), used(MIB)),)


def test_a_block_ended_where_something_was_put_behind_it_while_it_was_in_use() -> None:
    end = segment(0, unused(20 * MIB))
    there = 5 * MIB + 1024  # it had 1 KiB more than it asked for
    put_behind = [AllocatorEvent("alloc", there, 3 * MIB)]
    events = [*put_behind, *freed(there, 3 * MIB), *freed(0, 5 * MIB)]
    assert before(events, end) == (segment(0, used(there, 5 * MIB), unused(20 * MIB - there)),)
    # Put there after it was freed, it says nothing.
    events = [*freed(0, 5 * MIB), *put_behind, *freed(there, 3 * MIB)]
    assert before(events, end) == (segment(0, used(5 * MIB), unused(15 * MIB)),)


def test_only_the_first_that_is_put_behind_a_block_tells() -> None:
    end = segment(0, unused(20 * MIB))
    first, second = 5 * MIB, 5 * MIB + 1024
    events = [
        AllocatorEvent("alloc", first, 1024),
        AllocatorEvent("alloc", second, 1024),
        *freed(first, 1024),
        *freed(second, 1024),
        *freed(0, 5 * MIB),
    ]
    assert before(events, end) == (segment(0, used(5 * MIB), unused(15 * MIB)),)


def test_a_block_can_have_waited_for_a_stream() -> None:
    events = [AllocatorEvent("free_completed", 0, 512)]
    (start,) = before(events, segment(0, unused(2 * MIB), small=True))
    assert start.blocks[0] == BlockRecord(0, 512, 512, "active_pending_free")


def test_segments_come_and_go() -> None:
    kept = segment(100 * MIB, used(20 * MIB))
    events = [
        AllocatorEvent("segment_free", 0, 2 * MIB),
        AllocatorEvent("segment_free", 40 * MIB, 30 * MIB, 3),
        AllocatorEvent("segment_alloc", 0, 20 * MIB),
        AllocatorEvent("segment_free", 0, 20 * MIB),
    ]
    assert before(events, kept) == (
        segment(0, unused(2 * MIB), small=True),
        SegmentRecord(40 * MIB, 30 * MIB, 3, False, False, (BlockRecord(40 * MIB, 30 * MIB, 0, "inactive"),)),
        kept,
    )


def test_pages_come_and_go() -> None:
    end = segment(0, used(50 * MIB), unused(10 * MIB), expandable=True)
    events = [
        AllocatorEvent("segment_unmap", 80 * MIB, 20 * MIB),
        AllocatorEvent("segment_unmap", 60 * MIB, 20 * MIB),
        AllocatorEvent("segment_map", 20 * MIB, 20 * MIB),
        AllocatorEvent("alloc", 0, 50 * MIB),
    ]
    assert before(events, end, expandable=True) == (
        segment(0, unused(20 * MIB), expandable=True),
        segment(40 * MIB, unused(60 * MIB), expandable=True),
    )


def test_unmapped_pages_of_2_mib_are_of_the_small_pool() -> None:
    events = [AllocatorEvent("segment_unmap", 0, 2 * MIB)]
    assert before(events, expandable=True) == (segment(0, unused(2 * MIB), small=True, expandable=True),)
