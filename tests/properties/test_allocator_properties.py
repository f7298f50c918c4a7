"""Whatever is allocated and freed, the allocator's books are in order."""

from contextlib import suppress
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lightning_memtrain.core import MIB
from lightning_memtrain.tracing.allocator import (
    AllocatorSettings,
    CachingAllocator,
    DeviceFull,
    replay,
    start_state,
)

SIZES = st.one_of(
    st.integers(1, 3 * MIB // 2),
    st.integers(MIB, 25 * MIB),
    st.integers(1, 60).map(lambda mib: mib * MIB),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES, st.integers(0, 2)),
        st.tuples(st.sampled_from(["free", "let go", "complete"]), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("empty"), st.just(0), st.just(0)),
    ),
    max_size=60,
)
SETTINGS = st.sampled_from(
    [
        AllocatorSettings(),
        AllocatorSettings(expandable_segments=True),
        AllocatorSettings.parse("roundup_power2_divisions:4"),
        AllocatorSettings(max_split_size_bytes=24 * MIB),
    ]
)
LIMITS = st.none() | st.integers(20, 200).map(lambda mib: mib * MIB)


def run(allocator, actions):
    """What is left allocated, and what waits for a stream."""
    live, waiting = [], []
    for action, number, stream in actions:
        if action == "allocate":
            with suppress(DeviceFull):
                live.append(allocator.allocate(number, stream))
            waiting = [block for block in waiting if block.state == "active_pending_free"]
        elif action == "free" and live:
            allocator.free(live.pop(number % len(live)))
        elif action == "let go" and live:
            waiting.append(live.pop(number % len(live)))
            allocator.request_free(waiting[-1])
        elif action == "complete" and waiting:
            allocator.complete_free(waiting.pop(number % len(waiting)))
        elif action == "empty":
            allocator.empty_cache()
            waiting = []
    return live, waiting


def check(allocator, live, limit):
    segments = allocator.segments()
    end = 0
    for segment in segments:
        assert segment.address >= end  # segments do not overlap
        end = segment.address
        for block in segment.blocks:
            assert block.address == end  # no gap, no overlap
            assert block.size > 0
            assert block.size % 512 == 0
            end += block.size
        assert end == segment.address + segment.size
        states = [block.state for block in segment.blocks]
        assert ("inactive", "inactive") not in pairwise(states)  # neighbours merged
    held = {b.address: b for s in segments for b in s.blocks if b.state == "active_allocated"}
    assert {block.address: block.size for block in live} == {at: b.size for at, b in held.items()}
    assert all(block.requested <= block.size for block in live)
    assert allocator.allocated_bytes == sum(block.size for block in live)
    assert allocator.reserved_bytes == sum(segment.size for segment in segments)
    assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    assert limit is None or allocator.peak_reserved_bytes <= limit


@given(SETTINGS, LIMITS, ACTIONS)
def test_blocks_tile_their_segments_and_sums_add_up(how, limit, actions):
    allocator = CachingAllocator(how, limit_bytes=limit)
    live, _ = run(allocator, actions)
    check(allocator, live, limit)


@given(SETTINGS, LIMITS, ACTIONS)
def test_when_all_is_freed_each_segment_is_one_block_and_goes_back(how, limit, actions):
    allocator = CachingAllocator(how, limit_bytes=limit)
    live, waiting = run(allocator, actions)
    for block in live:
        allocator.free(block)
    for block in waiting:
        allocator.complete_free(block)
    assert [len(segment.blocks) for segment in allocator.segments()] == [1] * len(allocator.segments())
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert (allocator.segments(), allocator.reserved_bytes) == ((), 0)


@given(SETTINGS, ACTIONS)
def test_a_recording_from_its_beginning_is_replayed_exactly(how, actions):
    events = []
    allocator = CachingAllocator(how, observer=events.append)
    run(allocator, actions)
    comparison = replay(events, allocator.segments(), how)
    assert comparison.num_same_address == comparison.num_allocations
    assert (
        comparison.model_end_reserved_bytes == comparison.real_end_reserved_bytes == allocator.reserved_bytes
    )
    assert comparison.model_peak_reserved_bytes == allocator.peak_reserved_bytes


@given(SETTINGS, ACTIONS, ACTIONS)
def test_undoing_a_recording_finds_the_segments_of_its_beginning(how, past, actions):
    events = []
    allocator = CachingAllocator(how, observer=events.append)
    run(allocator, past)
    start, num_past = allocator.segments(), len(events)
    run(allocator, actions)
    found = start_state(events[num_past:], allocator.segments(), how)
    assert [segment[:5] for segment in found] == [segment[:5] for segment in start]
    in_use = [[(b.address, b.state) for b in s.blocks if b.state != "inactive"] for s in found]
    assert in_use == [[(b.address, b.state) for b in s.blocks if b.state != "inactive"] for s in start]
    assert (
        replay(events[num_past:], allocator.segments(), how).real_end_reserved_bytes
        == allocator.reserved_bytes
    )
