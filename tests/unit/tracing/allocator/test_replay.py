from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.cuda_allocator import compact_trace
from lightning_memtrain.core import MIB
from lightning_memtrain.tracing.allocator import (
    AllocatorEvent,
    AllocatorSettings,
    BlockRecord,
    CachingAllocator,
    DeviceFull,
    SegmentRecord,
    replay,
    settings_of,
)
from lightning_memtrain.tracing.allocator.events import ALLOC

TRACES = sorted((Path(os.environ.get("MEMTRAIN_DATA_DIR", "")) / "cuda_traces").glob("*.json.xz"))


def recorded(allocator_events: list[AllocatorEvent]) -> CachingAllocator:
    """An allocator that has a past: blocks of several sizes and streams, some freed, and one retry."""
    allocator = CachingAllocator(limit_bytes=200 * MIB, observer=allocator_events.append)
    kept = [allocator.allocate(mib * MIB, stream=mib % 2) for mib in (30, 3, 12, 5, 40, 1)]
    for block in kept[::2]:
        allocator.free(block)
    allocator.allocate(100 * MIB, stream=2)
    allocator.free(kept[1])
    allocator.allocate(4 * MIB)
    return allocator


def test_a_recording_of_the_model_is_replayed_exactly() -> None:
    events: list[AllocatorEvent] = []
    allocator = recorded(events)
    assert allocator.num_retries == 1
    comparison = replay(events, allocator.segments())
    assert (comparison.num_allocations, comparison.same_address_share) == (8, 1)
    assert comparison.num_events == len(events)
    assert comparison.model_peak_reserved_bytes == comparison.real_peak_reserved_bytes
    assert comparison.model_peak_reserved_bytes == allocator.peak_reserved_bytes
    assert (
        comparison.model_end_reserved_bytes == comparison.real_end_reserved_bytes == allocator.reserved_bytes
    )
    assert comparison.model_end_allocated_bytes == allocator.allocated_bytes


def test_the_second_half_of_a_recording_is_replayed_exactly() -> None:
    events: list[AllocatorEvent] = []
    allocator = recorded(events)
    comparison = replay(events[len(events) // 2 :], allocator.segments())
    assert comparison.same_address_share == 1
    assert comparison.model_end_allocated_bytes == allocator.allocated_bytes


def test_a_model_that_knows_the_limit_finds_out_itself_when_memory_goes_back() -> None:
    events: list[AllocatorEvent] = []
    allocator = recorded(events)
    told = replay(events, allocator.segments())
    assert replay(events, allocator.segments(), limit_bytes=200 * MIB) == told
    # With more memory nothing would have gone back.
    assert replay(events, allocator.segments(), limit_bytes=900 * MIB).model_end_reserved_bytes == 204 * MIB
    with pytest.raises(DeviceFull):
        replay(events, allocator.segments(), limit_bytes=90 * MIB)


# Blocks of 32 MiB and more are never split. There is no room for one of 40 MiB: another one, which is too
# large for it, goes back, and the small rest stays.
OVERSIZE = AllocatorSettings(max_split_size_bytes=32 * MIB)


def oversize(allocator: CachingAllocator) -> None:
    whole, part = allocator.allocate(80 * MIB), allocator.allocate(5 * MIB)
    allocator.free(whole)
    allocator.free(part)
    allocator.allocate(40 * MIB)


def several_oversize(allocator: CachingAllocator) -> None:
    kept = [allocator.allocate(mib * MIB) for mib in (34, 36, 38, 4)]
    for block in kept:
        allocator.free(block)
    allocator.allocate(70 * MIB)


def oversize_of_another_stream(allocator: CachingAllocator) -> None:
    """What another stream has goes back only with everything."""
    for block in [allocator.allocate(80 * MIB, stream=1), allocator.allocate(3 * MIB)]:
        allocator.free(block)
    allocator.allocate(50 * MIB)


def too_much(allocator: CachingAllocator) -> None:
    kept, free = allocator.allocate(40 * MIB), allocator.allocate(40 * MIB)
    allocator.free(free)
    with pytest.raises(DeviceFull):
        allocator.allocate(100 * MIB)
    allocator.free(kept)
    allocator.allocate(MIB // 2)


@pytest.mark.parametrize(
    ("history", "end_mib"),
    [
        (oversize, 60),  # 20 of a segment with nothing in it, and 40
        (several_oversize, 20 + 34 + 70),
        (oversize_of_another_stream, 50),
        (too_much, 42),
    ],
)
def test_blocks_that_are_never_split_go_back_alone(
    history: Callable[[CachingAllocator], None], end_mib: int
) -> None:
    events: list[AllocatorEvent] = []
    limit_mib = 130 if history is several_oversize else 110
    allocator = CachingAllocator(OVERSIZE, limit_bytes=limit_mib * MIB, observer=events.append)
    history(allocator)
    assert allocator.reserved_bytes == end_mib * MIB
    comparison = replay(events, allocator.segments(), OVERSIZE)
    assert comparison.same_address_share == 1
    assert comparison.model_end_reserved_bytes == comparison.real_end_reserved_bytes == end_mib * MIB
    assert comparison.model_peak_reserved_bytes == comparison.real_peak_reserved_bytes


def test_what_goes_back_last_goes_back_in_the_model() -> None:
    events: list[AllocatorEvent] = []
    allocator = CachingAllocator(observer=events.append)
    allocator.free(allocator.allocate(3 * MIB))
    allocator.empty_cache()
    comparison = replay(events, allocator.segments())
    assert comparison.real_end_reserved_bytes == comparison.model_end_reserved_bytes == 0


def test_an_address_is_not_given_twice_where_the_model_went_another_way() -> None:
    # The real one gave a segment back and got its address again, without its being full.
    events = [
        AllocatorEvent("segment_alloc", 0, 20 * MIB),
        AllocatorEvent("alloc", 0, 20 * MIB),
        AllocatorEvent("segment_free", 0, 20 * MIB),
        AllocatorEvent("segment_alloc", 0, 20 * MIB),
        AllocatorEvent("alloc", 0, 20 * MIB),
    ]
    block = BlockRecord(0, 20 * MIB, 20 * MIB, "active_allocated")
    comparison = replay(events, [SegmentRecord(0, 20 * MIB, 0, False, False, (block,))])
    assert comparison.num_same_address == 1
    assert comparison.model_end_reserved_bytes == 40 * MIB


def test_expandable_segments_are_known_by_what_was_recorded() -> None:
    events: list[AllocatorEvent] = []
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True), observer=events.append)
    block = allocator.allocate(MIB)
    expandable = (AllocatorSettings(expandable_segments=True), "")
    assert settings_of(events, allocator.segments(), {}) == expandable
    assert settings_of([], allocator.segments(), {}) == expandable
    allocator.free(block)
    allocator.empty_cache()
    assert settings_of(events, allocator.segments(), {}) == expandable
    assert settings_of([], [], {}) == (AllocatorSettings(), "")


def test_another_placement_is_counted() -> None:
    # The real one put the second block into a segment of its own, which the rules do not allow.
    events = [
        AllocatorEvent("segment_alloc", 0, 20 * MIB),
        AllocatorEvent("alloc", 0, 4 * MIB),
        AllocatorEvent("segment_alloc", 100 * MIB, 20 * MIB),
        AllocatorEvent("alloc", 100 * MIB, 4 * MIB),
    ]
    blocks = (
        BlockRecord(0, 4 * MIB, 4 * MIB, "active_allocated"),
        BlockRecord(4 * MIB, 16 * MIB, 0, "inactive"),
    )
    moved = tuple(block._replace(address=block.address + 100 * MIB) for block in blocks)
    end = [SegmentRecord(at, 20 * MIB, 0, False, False, b) for at, b in ((0, blocks), (100 * MIB, moved))]
    comparison = replay(events, end)
    assert (comparison.num_same_address, comparison.same_address_share) == (1, 0.5)
    assert (comparison.real_end_reserved_bytes, comparison.model_end_reserved_bytes) == (40 * MIB, 20 * MIB)


def test_a_recording_without_allocations_has_no_wrong_address() -> None:
    assert replay([], []).same_address_share == 1


needs_traces = pytest.mark.skipif(not TRACES, reason="no recordings of real devices in $MEMTRAIN_DATA_DIR")


def load(path: Path) -> tuple[Sequence[AllocatorEvent], Sequence[SegmentRecord], AllocatorSettings]:
    device, settings = compact_trace(path)
    return device.events, device.segments, AllocatorSettings.from_snapshot(settings)


@needs_traces
def test_every_allocation_of_real_devices_is_where_it_was() -> None:
    wrong = {}
    for path in TRACES:
        comparison = replay(*load(path))
        exact = comparison.num_same_address == comparison.num_allocations
        peak = comparison.model_peak_reserved_bytes == comparison.real_peak_reserved_bytes
        if not (exact and peak and comparison.model_end_reserved_bytes == comparison.real_end_reserved_bytes):
            wrong[path.name] = comparison
    assert wrong == {}


@needs_traces
def test_the_check_above_can_fail() -> None:
    events, end, _ = load(next(path for path in TRACES if path.name.startswith("expandable")))
    comparison = replay(events, end, AllocatorSettings())
    assert comparison.num_same_address < comparison.num_allocations == sum(e.action == ALLOC for e in events)


@needs_traces
def test_a_limit_alone_tells_when_a_real_device_was_full() -> None:
    # Any limit from the highest that was reserved to the least at which an allocation failed.
    events, end, settings = load(next(path for path in TRACES if path.name.startswith("llm_ten_streams")))
    told = replay(events, end, settings)
    assert told.real_peak_reserved_bytes == 21_476 * MIB
    assert replay(events, end, settings, limit_bytes=21_476 * MIB) == told
    assert replay(events, end, settings, limit_bytes=21_511 * MIB) == told
    assert replay(events, end, settings, limit_bytes=21_600 * MIB).same_address_share < 1
