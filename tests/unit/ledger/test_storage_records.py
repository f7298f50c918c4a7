"""The pure function from lives of storages to a breakdown, on lives written by hand."""

import pytest

from lightning_memtrain.core import Category, CategoryBytes, Growth, MemoryBreakdown
from lightning_memtrain.ledger.storage_records import (
    Event,
    StorageRecord,
    build_breakdown,
    held_at_peak,
    sum_growth,
)


def record(num_bytes, born, died, category=Category.TEMPORARY, producer="", saver=None, recomputed=False):
    made = StorageRecord(num_bytes, born, category, producer)
    made.died, made.saver, made.recomputed = died, saver, recomputed
    return made


LIVES = [
    record(100, 0, None, Category.PARAMETERS),
    record(10, 1, 4, Category.ACTIVATIONS, "a", "b"),
    record(20, 2, 3, producer="b"),
    record(15, 3, None, Category.ACTIVATIONS, "b", "b", recomputed=True),
]
EVENTS = [Event(0, "start"), Event(2, "forward b"), Event(3, "backward")]


def test_peak_maxima_and_ends():
    breakdown = build_breakdown(LIVES, EVENTS, device="cpu", module_types={"": "Net", "a": "A", "b": "B"})
    assert breakdown.at_peak == CategoryBytes({"parameters": 100, "activations": 10, "temporary": 20})
    assert breakdown.maxima == CategoryBytes({"parameters": 100, "activations": 25, "temporary": 20})
    assert (breakdown.start_bytes, breakdown.ledger_peak_bytes, breakdown.end_bytes) == (100, 130, 115)
    assert (breakdown.recomputed_at_peak_bytes, breakdown.recomputed_max_bytes) == (0, 15)
    assert breakdown.peak_event == "forward b"


def test_timeline_samples_every_event_and_the_peak():
    breakdown = build_breakdown(LIVES, EVENTS, device="cpu", module_types={})
    assert [(event.index, event.name, event.held.total_bytes) for event in breakdown.timeline] == [
        (0, "start", 100),
        (1, "forward b", 130),
        (2, "peak, in forward b", 130),
        (3, "backward", 125),
    ]


def test_module_rows_hold_what_was_live_at_the_peak():
    rows = build_breakdown(LIVES, EVENTS, device="cpu", module_types={"": "Net", "a": "A", "b": "B"}).modules
    assert [(row.name, row.type_name, row.produced_bytes, row.saved_bytes) for row in rows] == [
        ("", "Net", 0, 0),
        ("a", "A", 10, 0),
        ("b", "B", 20, 10),
    ]


def test_rows_and_timeline_can_be_left_out():
    breakdown = build_breakdown(
        LIVES, EVENTS, device="cpu", module_types={}, per_module=False, timeline=False
    )
    assert breakdown.modules == ()
    assert breakdown.timeline == ()
    assert breakdown.ledger_peak_bytes == 130


def test_a_change_of_category_is_one_moment():
    first = record(50, 1, None, Category.ACTIVATIONS)
    second = first.continued(2)
    second.category = Category.GRADIENTS
    breakdown = build_breakdown([first, second], [], device="cpu", module_types={})
    assert breakdown.ledger_peak_bytes == 50
    assert breakdown.at_peak[Category.ACTIVATIONS] == 50
    assert breakdown.maxima[Category.GRADIENTS] == 50
    assert breakdown.end_bytes == 50


def test_an_empty_ledger():
    breakdown = build_breakdown([], [], device="cpu", module_types={})
    assert breakdown.peak_bytes == breakdown.start_bytes == breakdown.end_bytes == 0


def test_growth_is_added_up_per_module_largest_first():
    assert sum_growth([("a", 1), ("b", 5), ("a", 2)]) == (Growth("b", 5, 1), Growth("a", 3, 2))


def test_truth_makes_the_rows_add_up():
    breakdown = build_breakdown(LIVES, EVENTS, device="cpu", module_types={}).with_allocator_peak(150)
    assert breakdown.at_peak[Category.WORKSPACE] == 20
    assert breakdown.peak_bytes == breakdown.at_peak.total_bytes == 150
    assert breakdown.ledger_peak_bytes == 130
    assert breakdown.with_allocator_peak(None).peak_bytes == 130


def test_groups_of_the_memory_report():
    held = CategoryBytes({category.value: 2**index for index, category in enumerate(Category)})
    assert held.model_bytes == 1 + 16 + 128 + 1024
    assert held.optimizer_bytes == 2 + 4 + 256 + 512
    assert held.activation_bytes == 8 + 32 + 64 + 2048
    assert held.total_bytes == 4095


def test_rows_of_several_processes_are_shown_where_they_hold_something():
    usual = [category for category in Category if category.is_usual]
    alone = MemoryBreakdown(device="cpu", at_peak=CategoryBytes(), maxima=CategoryBytes())
    assert [*alone.shown] == usual
    averaged = MemoryBreakdown(device="cpu", at_peak=CategoryBytes(), maxima=CategoryBytes({"buckets": 1}))
    assert set(averaged.shown) == {*usual, Category.BUCKETS}


def test_unknown_categories_are_refused():
    with pytest.raises(ValueError, match=r"bytes_by_category\)` must be bytes by category, .*wieghts"):
        CategoryBytes({"wieghts": 1})


def test_what_is_aside_counts_for_no_peak_but_its_own():
    lives = [
        *LIVES,
        record(1000, 5, 7, Category.ACTIVATIONS, recomputed=True),
        record(40, 6, 8),
        record(9, 9, None, Category.ACTIVATIONS),
    ]
    events = [*EVENTS, Event(4, "probe"), Event(8, "goes on")]
    options = {"device": "cpu", "module_types": {}}
    with_it = build_breakdown(lives, events, **options)
    assert (with_it.ledger_peak_bytes, with_it.peak_event, with_it.aside_peak_bytes) == (1155, "probe", 0)
    without = build_breakdown(lives, events, **options, asides=[(4, 8)])
    assert (without.ledger_peak_bytes, without.peak_event) == (130, "forward b")
    assert without.aside_peak_bytes == 1155
    assert without.maxima == CategoryBytes({"parameters": 100, "activations": 25, "temporary": 20})
    assert without.recomputed_max_bytes == 15
    assert without.end_bytes == with_it.end_bytes == 124
    # It stays on the timeline.
    assert [event.name for event in without.timeline if not event.name.startswith("peak")] == [
        *("start", "forward b", "backward", "probe", "goes on")
    ]


def test_what_comes_after_something_aside_counts_again():
    lives = [record(10, 0, None), record(50, 1, 2), record(20, 3, 4), record(60, 5, 6), record(30, 7, None)]
    breakdown = build_breakdown(lives, [], device="cpu", module_types={}, asides=[(0, 2), (4, 6)])
    assert (breakdown.ledger_peak_bytes, breakdown.aside_peak_bytes) == (40, 70)


def test_the_highest_moment_of_a_stretch():
    held = [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 4), (0, 4)]
    totals = [held_at_peak(LIVES, first, last).total_bytes for first, last in held]
    assert totals == [100, 110, 130, 130, 125, 115, 130]
    assert held_at_peak(LIVES, 3, 4) == CategoryBytes({"parameters": 100, "activations": 25})
