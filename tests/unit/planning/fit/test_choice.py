"""Which pairs there are, and which are tried."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lightning_memtrain.checkpointing.selection.step_chain import ChainStage, CheckpointSchedule
from lightning_memtrain.planning.fit.choice.between_sizes import alike, between, on_line
from lightning_memtrain.planning.fit.choice.bounds import Bounds
from lightning_memtrain.planning.fit.choice.pairs import Pair, SizeCurve, chunk_counts, front
from lightning_memtrain.planning.fit.choice.sized_steps import SizedSteps

SCHEDULES = (
    CheckpointSchedule(100, 0.0, ()),
    CheckpointSchedule(80, 1.0, (("a",),)),
    CheckpointSchedule(60, 2.0, (("a",), ("b",))),
    CheckpointSchedule(50, 4.0, (("a", "b"),)),
)


def test_every_chunk_pays_for_what_it_recomputes():
    curve = SizeCurve(3, 4, 30.0, SCHEDULES[:2], more_bytes=5)
    assert curve.pairs() == [Pair(3, 4, (), 105, 30.0), Pair(3, 4, (("a",),), 85, 33.0)]


def test_the_front_mixes_numbers_of_chunks():
    whole, halves = SizeCurve(1, 8, 10.0, SCHEDULES), SizeCurve(2, 4, 11.0, [CheckpointSchedule(70, 0.0, ())])
    found = [(pair.num_chunks, pair.peak_bytes, pair.seconds) for pair in front([whole, halves])]
    assert found == [(1, 100, 10.0), (2, 70, 11.0), (1, 60, 12.0), (1, 50, 14.0)]


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(1, [1]), (2, [1, 2]), (7, [1, 2, 3, 4, 7]), (12, [1, 2, 3, 4, 6, 12])],
)
def test_numbers_of_chunks_make_chunks_of_different_sizes(batch_size: int, expected: list[int]):
    assert chunk_counts(batch_size) == expected


def test_many_numbers_of_chunks_are_thinned_out_with_both_ends():
    counts = chunk_counts(4096)
    assert (counts[0], counts[-1]) == (1, 4096)
    assert len(counts) <= 41
    assert all(later <= 2 * earlier for earlier, later in pairwise(counts))


def chain_of(size: int) -> tuple[ChainStage, ...]:
    part = ChainStage("block.a", 10 + 3 * size, 20 + 4 * size, 2 * size, seconds=0.5 + size)
    return (ChainStage("block", 10 + 3 * size, 20 + 4 * size, 5 * size, parts=(part,)),)


@pytest.mark.parametrize("size", [1, 4, 6, 10, 16])
def test_between_two_sizes_and_beyond_a_chain_is_on_their_line(size: int):
    assert between(chain_of(4), chain_of(10), (size - 4) / 6) == chain_of(size)


def test_numbers_on_a_line_do_not_fall_below_nothing():
    assert (on_line(2.0, 6.0, 0.5), on_line(2.0, 6.0, -1.0)) == (4.0, 0.0)


def test_chains_are_alike_if_their_parts_are():
    other = (ChainStage("block", 1, 1, parts=(ChainStage("block.b", 1, 1),)),)
    assert alike(chain_of(1), chain_of(2))
    assert not alike(chain_of(1), other)
    assert not alike(chain_of(1), (*other, *other))


def test_nothing_is_known_of_chunks_before_two_sizes_were_traced():
    steps = SizedSteps()
    assert steps.curve(1, 8) is None
    assert steps.curve(2, 4) is None
    assert not steps.is_near(2, 4)


def follow(curve: SizeCurve, limit_bytes: int, error: dict[int, int]) -> list[tuple[int, bool]]:
    """What is tried, and whether it fits, where some schedules need more or less than the curve says."""
    bounds, tried = Bounds(limit_bytes), {}
    while (pair := bounds.next_pair([curve], lambda one: one.peak_bytes in tried)) is not None:
        needed = pair.peak_bytes + error.get(pair.peak_bytes, 0)
        bounds.note(pair, needed)
        tried[pair.peak_bytes] = needed <= limit_bytes
    return [*tried.items()]


def test_what_fits_as_the_curve_says_is_tried_once():
    assert follow(SizeCurve(1, 8, 1.0, SCHEDULES), 85, {}) == [(80, True)]


def test_what_needs_more_is_followed_by_what_is_lower_by_as_much():
    assert follow(SizeCurve(1, 8, 1.0, SCHEDULES), 85, {80: 20}) == [(80, False), (60, True)]


def test_the_lowest_is_tried_before_a_limit_is_given_up():
    assert follow(SizeCurve(1, 8, 1.0, SCHEDULES), 62, {60: 30}) == [(60, False), (50, True)]
    assert follow(SizeCurve(1, 8, 1.0, SCHEDULES), 62, {60: 30, 50: 13}) == [(60, False), (50, False)]


def test_what_needs_less_is_followed_by_what_may_be_higher_by_as_much():
    assert follow(SizeCurve(1, 8, 1.0, SCHEDULES), 85, {80: -20, 100: -20}) == [(80, True), (100, True)]
