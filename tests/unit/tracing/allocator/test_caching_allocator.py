"""One rule of torch's caching allocator per test, on allocations that are written out by hand."""

from __future__ import annotations

import pytest

from lightning_memtrain.core import GIB, KIB, MIB
from lightning_memtrain.tracing.allocator import (
    AllocatorEvent,
    AllocatorSettings,
    CachingAllocator,
    DeviceFull,
)

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def layout(allocator: CachingAllocator) -> list[list[tuple[int, str]]]:
    """Size and state of each block, by segment."""
    return [[(block.size, block.state) for block in segment.blocks] for segment in allocator.segments()]


def used(size: int) -> tuple[int, str]:
    return size, "active_allocated"


def unused(size: int) -> tuple[int, str]:
    return size, "inactive"


@pytest.mark.parametrize(("asked", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)])
def test_a_block_is_a_multiple_of_512_bytes(asked: int, taken: int) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(asked).size == taken
    assert allocator.allocated_bytes == taken


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (GIB + 1, GIB + 2 * MIB),
    ],
)
def test_what_is_taken_from_the_device_for_a_first_block(asked: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(asked)
    assert allocator.reserved_bytes == reserved


def test_small_and_large_blocks_share_no_segment() -> None:
    allocator = CachingAllocator()
    allocator.allocate(4 * MIB)
    allocator.allocate(MIB)
    assert layout(allocator) == [[used(4 * MIB), unused(16 * MIB)], [used(MIB), unused(MIB)]]


def test_a_rest_of_512_bytes_is_split_off_in_the_small_pool() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(MIB))
    for _ in range(3):
        allocator.allocate(MIB - 512)
    # Two in the first segment, whose last KiB is of no use to the third.
    assert layout(allocator) == [
        [used(MIB - 512), used(MIB - 512), unused(KIB)],
        [used(MIB - 512), unused(MIB + 512)],
    ]


def test_a_rest_of_1_mib_stays_with_its_block_in_the_large_pool() -> None:
    allocator = CachingAllocator()
    allocator.allocate(19 * MIB)
    assert layout(allocator) == [[used(20 * MIB)]]
    assert allocator.allocated_bytes == 20 * MIB


def test_a_rest_of_more_than_1_mib_is_split_off_in_the_large_pool() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * MIB))
    allocator.allocate(19 * MIB - 512)
    assert layout(allocator) == [[used(19 * MIB - 512), unused(MIB + 512)]]


def test_freed_blocks_merge_with_free_neighbours_on_both_sides() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    assert layout(allocator) == [
        [unused(4 * MIB), used(4 * MIB), unused(4 * MIB), used(4 * MIB), used(4 * MIB)]
    ]
    allocator.free(blocks[1])
    assert layout(allocator) == [[unused(12 * MIB), used(4 * MIB), used(4 * MIB)]]


def test_segments_side_by_side_do_not_merge() -> None:
    allocator = CachingAllocator()
    first, second = allocator.allocate(10 * MIB), allocator.allocate(10 * MIB)
    assert first.end == second.address
    allocator.free(first)
    allocator.free(second)
    assert layout(allocator) == [[unused(10 * MIB)], [unused(10 * MIB)]]


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = {mib: allocator.allocate(mib * MIB) for mib in (40, 30, 50)}
    addresses = {mib: block.address for mib, block in blocks.items()}
    for block in blocks.values():
        allocator.free(block)
    assert allocator.allocate(29 * MIB).address == addresses[30]
    assert allocator.allocate(31 * MIB).address == addresses[40]
    assert allocator.reserved_bytes == 120 * MIB


def test_of_blocks_of_one_size_the_lowest_address_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(30 * MIB) for _ in range(3)]
    lowest = blocks[0].address
    for block in reversed(blocks):
        allocator.free(block)
    assert allocator.allocate(30 * MIB).address == lowest


def test_a_block_is_for_its_own_stream_only() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(30 * MIB, stream=1))
    allocator.allocate(30 * MIB, stream=2)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.allocate(30 * MIB, stream=1)
    assert allocator.reserved_bytes == 60 * MIB


def test_a_block_that_another_stream_may_use_is_not_allocated_and_not_free() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(30 * MIB)
    allocator.request_free(block)
    assert allocator.allocated_bytes == 0
    assert layout(allocator) == [[(30 * MIB, "active_pending_free")]]
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.complete_free(block)
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 60 * MIB


def test_empty_cache_gives_back_what_is_free_as_a_whole() -> None:
    allocator = CachingAllocator()
    whole, part = allocator.allocate(30 * MIB), allocator.allocate(4 * MIB)
    allocator.free(whole)
    allocator.empty_cache()
    assert layout(allocator) == [[used(4 * MIB), unused(16 * MIB)]]
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (20 * MIB, 50 * MIB)
    allocator.free(part)
    allocator.empty_cache()
    assert allocator.segments() == ()
    assert allocator.reserved_bytes == 0


def test_a_full_device_gets_free_segments_back_and_the_allocation_is_tried_again() -> None:
    events: list[AllocatorEvent] = []
    allocator = CachingAllocator(limit_bytes=100 * MIB, observer=events.append)
    kept, waiting = allocator.allocate(30 * MIB, stream=1), allocator.allocate(40 * MIB, stream=2)
    allocator.request_free(waiting)  # torch waits for its stream
    allocator.allocate(60 * MIB)
    assert allocator.num_retries == 1
    assert allocator.reserved_bytes == 90 * MIB
    assert [(event.action, event.size // MIB, event.stream) for event in events[4:]] == [
        ("free_requested", 40, 2),
        ("free_completed", 40, 2),
        ("segment_free", 40, 2),
        ("segment_alloc", 60, 0),
        ("alloc", 60, 0),
    ]
    assert kept.state == "active_allocated"


def test_out_of_memory_says_what_was_there() -> None:
    events: list[AllocatorEvent] = []
    allocator = CachingAllocator(limit_bytes=100 * MIB, observer=events.append)
    allocator.allocate(4 * MIB)
    with pytest.raises(
        DeviceFull, match=r"90\.00 MiB does not fit: of 100\.00 MiB, 4\.00 MiB are"
    ) as failure:
        allocator.allocate(90 * MIB)
    assert failure.value.requested_bytes == 90 * MIB
    assert failure.value.allocated_bytes == 4 * MIB
    assert failure.value.reserved_bytes == 20 * MIB
    assert failure.value.limit_bytes == 100 * MIB
    assert events[-1] == ("oom", 0, 90 * MIB, 0)
    allocator.allocate(80 * MIB)  # what fits still does


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_an_allocation_of_no_bytes_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=rf"`allocate\(num_bytes\)` must be at least 1, but got {num_bytes}"):
        CachingAllocator().allocate(num_bytes)


def test_a_block_is_freed_once() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(1)
    with pytest.raises(
        ValueError, match=r"must have been let go of, but got a block that is active_allocated"
    ):
        allocator.complete_free(block)
    allocator.free(block)
    with pytest.raises(ValueError, match=r"`request_free\(block\)` must be allocated, .* is inactive"):
        allocator.free(block)


def test_expandable_segments_map_pages_of_20_mib_side_by_side() -> None:
    events: list[AllocatorEvent] = []
    allocator = CachingAllocator(EXPANDABLE, observer=events.append)
    first, second = allocator.allocate(15 * MIB), allocator.allocate(30 * MIB)
    assert second.address == first.end
    assert layout(allocator) == [[used(15 * MIB), used(30 * MIB), unused(15 * MIB)]]
    mapped = [
        (event.address - first.address, event.size) for event in events if event.action == "segment_map"
    ]
    assert mapped == [(0, 20 * MIB), (20 * MIB, 40 * MIB)]


def test_expandable_segments_of_the_small_pool_map_pages_of_2_mib() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    for _ in range(3):
        allocator.allocate(MIB)
    assert layout(allocator) == [[used(MIB), used(MIB), used(MIB), unused(MIB)]]


def test_expandable_segments_split_off_every_rest() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    allocator.allocate(20 * MIB - 512)
    assert layout(allocator) == [[used(20 * MIB - 512), unused(512)]]


def test_a_block_that_can_grow_is_left_for_what_needs_it() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    hole, wall = allocator.allocate(18 * MIB), allocator.allocate(6 * MIB)
    lowest = hole.address
    allocator.free(hole)
    # 16 MiB are free at the end, which fits better, but they can grow.
    assert layout(allocator) == [[unused(18 * MIB), used(6 * MIB), unused(16 * MIB)]]
    assert allocator.allocate(10 * MIB).address == lowest
    assert wall.state == "active_allocated"


def test_pages_of_expandable_segments_that_are_free_as_a_whole_go_back() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    blocks = [allocator.allocate(25 * MIB) for _ in range(4)]
    base = blocks[0].address
    allocator.free(blocks[1])
    allocator.empty_cache()
    assert allocator.reserved_bytes == 100 * MIB  # of the pages from 20 and from 40 on, half is in use
    allocator.free(blocks[2])
    allocator.empty_cache()
    # Free is 25 to 75: the page from 40 to 60 is in between.
    assert layout(allocator) == [[used(25 * MIB), unused(15 * MIB)], [unused(15 * MIB), used(25 * MIB)]]
    assert allocator.reserved_bytes == 80 * MIB
    # 30 MiB are found where 15 are free, 20 can be mapped and 15 more are free.
    assert allocator.allocate(30 * MIB).address == base + 25 * MIB
    assert allocator.reserved_bytes == 100 * MIB


def test_an_expandable_segment_without_memory_is_gone() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    block = allocator.allocate(30 * MIB)
    first = block.address
    allocator.free(block)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, ())
    assert allocator.allocate(30 * MIB).address != first


def test_a_full_device_gets_pages_back() -> None:
    allocator = CachingAllocator(EXPANDABLE, limit_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB, stream=1))
    allocator.allocate(80 * MIB, stream=2)
    assert (allocator.num_retries, allocator.reserved_bytes) == (1, 80 * MIB)
    with pytest.raises(DeviceFull):
        allocator.allocate(40 * MIB, stream=1)


def test_blocks_above_max_split_size_are_kept_whole_and_apart() -> None:
    allocator = CachingAllocator(AllocatorSettings(max_split_size_bytes=100 * MIB))
    allocator.free(allocator.allocate(200 * MIB))
    allocator.allocate(50 * MIB)
    assert layout(allocator) == [[unused(200 * MIB)], [used(50 * MIB)]]
    allocator.allocate(150 * MIB)  # 50 MiB of waste are too many
    assert layout(allocator) == [[unused(200 * MIB)], [used(50 * MIB)], [used(150 * MIB)]]
    allocator.allocate(190 * MIB)
    assert layout(allocator) == [[used(200 * MIB)], [used(50 * MIB)], [used(150 * MIB)]]


def test_a_full_device_first_gets_as_many_blocks_above_max_split_size_as_it_needs() -> None:
    settings = AllocatorSettings(max_split_size_bytes=100 * MIB)
    allocator = CachingAllocator(settings, limit_bytes=500 * MIB)
    for block in [allocator.allocate(mib * MIB) for mib in (110, 120, 200, 30)]:
        allocator.free(block)
    allocator.allocate(160 * MIB)  # 200 MiB alone are enough
    assert allocator.num_retries == 0
    assert layout(allocator) == [
        [unused(110 * MIB)],
        [unused(120 * MIB)],
        [unused(30 * MIB)],
        [used(160 * MIB)],
    ]
    allocator.allocate(210 * MIB)  # none is enough: the largest two
    assert allocator.num_retries == 0
    assert layout(allocator) == [[unused(30 * MIB)], [used(160 * MIB)], [used(210 * MIB)]]
