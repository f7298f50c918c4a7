"""Whatever storages live and die, the breakdown equals a naive count of every moment."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memtrain.core import Category, MemoryBreakdown
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.storage_records import Event, StorageRecord, build_breakdown

CATEGORIES = [category for category in Category if category is not Category.WORKSPACE]
# The batch, and what processes exchange.
OF_NO_MODULE = [
    Category.HELD,
    Category.INPUTS,
    Category.BUCKETS,
    Category.GATHERED_WEIGHTS,
    Category.UNSHARDED_GRADIENTS,
]


@st.composite
def lives(draw):
    records = []
    for _ in range(draw(st.integers(0, 12))):
        born = draw(st.integers(0, 20))
        record = StorageRecord(draw(st.integers(0, 1000)), born, draw(st.sampled_from(CATEGORIES)))
        record.died = draw(st.none() | st.integers(born + 1, 22))
        record.producer = draw(st.sampled_from(["", "a", "a.b"]))
        record.saver = draw(st.none() | st.sampled_from(["a", "a.b"]))
        record.recomputed = draw(st.booleans())
        records.append(record)
    return records


@given(lives(), st.lists(st.integers(0, 22), max_size=5))
def test_analysis_equals_a_naive_count(records, ticks):
    def held(tick, category=None):
        return sum(r.num_bytes for r in records if r.live_at(tick) and category in (None, r.category))

    events = [Event(tick, f"event {tick}") for tick in sorted(ticks)]
    breakdown = build_breakdown(records, events, device="cpu", module_types={"": "N", "a": "A", "a.b": "B"})
    totals = [held(tick) for tick in range(24)]
    peak = totals.index(max(totals))
    assert breakdown.ledger_peak_bytes == max(totals)
    for category in CATEGORIES:
        assert breakdown.at_peak[category] == held(peak, category)
        assert breakdown.maxima[category] == max(held(tick, category) for tick in range(24))
    sampled = [event for event in breakdown.timeline if not event.name.startswith("peak")]
    assert [event.held.total_bytes for event in sampled] == [held(event.tick) for event in events]
    rows = sum(row.total_bytes for row in breakdown.modules)
    assert rows + sum(breakdown.at_peak[category] for category in OF_NO_MODULE) == max(totals)
    assert MemoryBreakdown.from_dict(breakdown.to_dict()) == breakdown


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["new", "view", "drop", "inplace"]), st.integers(0, 63)), max_size=30)
)
def test_live_bytes_equal_the_bytes_of_distinct_storages(actions):
    model = torch.nn.Linear(1, 1)
    with MemoryLedger(model) as ledger:
        before = ledger.current_bytes
        tensors = []
        for action, number in actions:
            if action == "new":
                tensors.append(torch.zeros(number + 1))
            elif tensors:
                chosen = tensors[number % len(tensors)]
                if action == "view":
                    tensors.append(chosen[number % max(len(chosen), 1) :])
                elif action == "inplace":
                    chosen.add_(1)
                else:
                    tensors.pop(number % len(tensors))
                del chosen
            distinct = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            assert ledger.current_bytes - before == sum(distinct.values())
