"""Life of every storage, and the pure function that turns lives into a breakdown.

The ledger only writes down when each storage was born and when it died, in ticks of a clock that advances
with every such change. Peak, maxima, timeline and module rows all follow from that list afterwards, so
that they cannot disagree with each other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch

from lightning_memtrain.core import (
    Category,
    CategoryBytes,
    Growth,
    MemoryBreakdown,
    ModuleMemory,
    TimelineEvent,
)

FROM_THE_START = 0
#: A tick that no clock reaches.
NEVER = 2**63
TRANSIENT = (Category.ACTIVATIONS, Category.TEMPORARY)


class StorageRecord:
    """One storage of one size and one category, from tick ``born`` until before tick ``died``.

    Args:
        num_bytes: size of the storage.
        born: tick of its allocation; :data:`FROM_THE_START` if it was live when the ledger was entered.
        category: what it is used for.
        producer: path of the module that made it.
    """

    __slots__ = (
        "born",
        "category",
        "died",
        "existed_before",
        "num_bytes",
        "owner",
        "producer",
        "recomputed",
        "saver",
    )

    def __init__(self, num_bytes: int, born: int, category: Category, producer: str = "") -> None:
        self.num_bytes = num_bytes
        self.born = born
        self.existed_before = born == FROM_THE_START  # the storage, though maybe with another size
        self.died: int | None = None
        self.category = category
        self.producer = producer
        self.saver: str | None = None  # module that saved it for backward
        self.owner: str | None = None  # module whose parameter (gradient, state) or buffer it is
        self.recomputed = False

    def live_at(self, tick: int) -> bool:
        """Whether the storage was live right after ``tick``."""
        return self.born <= tick and (self.died is None or self.died > tick)

    def continued(self, tick: int) -> StorageRecord:
        """Close this record at ``tick`` and open the next one of the same storage, to be changed."""
        successor = StorageRecord(self.num_bytes, tick, self.category, self.producer)
        successor.saver, successor.owner, successor.recomputed = self.saver, self.owner, self.recomputed
        successor.existed_before = self.existed_before
        self.died = tick
        return successor


class StorageReference(weakref.ref[torch.UntypedStorage]):
    """Weak reference to a storage that still knows, when the storage is freed, which one it was."""

    __slots__ = ("key", "record")
    key: int
    record: StorageRecord


@dataclass(frozen=True)
class Survivor:
    """A storage that was live when its ledger was left and is no part of the training state.

    It holds a weak reference only: looking at it keeps nothing alive.

    Args:
        module: path of the module that made it.
        num_bytes: its size.
        reference: weak reference to the storage.
    """

    module: str
    num_bytes: int
    reference: weakref.ref[torch.UntypedStorage]

    @property
    def alive(self) -> bool:
        """Whether the storage still exists, so that its memory is still taken."""
        return self.reference() is not None


class Event(NamedTuple):
    """A named moment of the step, right after ``tick``."""

    tick: int
    name: str


def build_breakdown(
    records: Sequence[StorageRecord],
    events: Sequence[Event],
    *,
    device: str,
    module_types: Mapping[str, str],
    grown: Iterable[StorageRecord] = (),
    per_module: bool = True,
    timeline: bool = True,
    asides: Sequence[tuple[int, int]] = (),
) -> MemoryBreakdown:
    """Turn the lives of storages into a breakdown.

    Args:
        records: every storage that was ever live.
        events: named moments, in order of their ticks.
        device: name of the device for the breakdown.
        module_types: class name per module path.
        grown: the records that outlived their step and are no training state.
        per_module: whether to make the module rows.
        timeline: whether to make the timeline rows.
        asides: ticks between which nothing counts for peak and maxima, in order; those of the peak of the
            asides.

    Returns:
        The breakdown without an allocator's peak. Among equal peaks the first counts.
    """
    categories = list(Category)
    position = {category: index for index, category in enumerate(categories)}
    changes: list[tuple[int, int, int, int]] = []  # tick, position of the category, bytes, recomputed bytes
    for record in records:
        column = position[record.category]
        recomputed_bytes = record.num_bytes if record.recomputed else 0
        changes.append((record.born, column, record.num_bytes, recomputed_bytes))
        if record.died is not None:
            changes.append((record.died, column, -record.num_bytes, -recomputed_bytes))
    changes.sort(key=itemgetter(0))

    held = [0] * len(categories)
    maxima = list(held)
    at_peak = list(held)
    total = peak = start_bytes = recomputed = recomputed_max = recomputed_at_peak = 0
    aside_peak = 0
    left = list(asides)
    peak_tick = FROM_THE_START
    samples: list[TimelineEvent] = []
    next_event = 0
    index = 0
    while index < len(changes):
        tick = changes[index][0]
        if timeline:
            while next_event < len(events) and events[next_event].tick < tick:
                samples.append(_sample(next_event, events[next_event].name, held))
                next_event += 1
        # All changes of one tick are one moment: a storage changes its category in one.
        touched = set()
        while index < len(changes) and changes[index][0] == tick:
            _, column, num_bytes, recomputed_bytes = changes[index]
            held[column] += num_bytes
            total += num_bytes
            recomputed += recomputed_bytes
            touched.add(column)
            index += 1
        if tick == FROM_THE_START:
            start_bytes = total
        while left and left[0][1] <= tick:
            del left[0]
        if left and left[0][0] < tick:
            aside_peak = max(aside_peak, total)
            continue
        for column in touched:
            maxima[column] = max(maxima[column], held[column])
        recomputed_max = max(recomputed_max, recomputed)
        if total > peak:
            peak, peak_tick, at_peak, recomputed_at_peak = total, tick, list(held), recomputed
    if timeline:
        for late in range(next_event, len(events)):
            samples.append(_sample(late, events[late].name, held))

    before_peak = [event.name for event in events if event.tick <= peak_tick]
    peak_event = before_peak[-1] if before_peak else ""
    if timeline:
        name = f"peak, in {peak_event}" if peak_event else "peak"
        samples.insert(len(before_peak), _sample(len(before_peak), name, at_peak))
        samples = [TimelineEvent(i, sample.name, sample.held) for i, sample in enumerate(samples)]
    return MemoryBreakdown(
        device=device,
        at_peak=CategoryBytes.from_values(at_peak),
        maxima=CategoryBytes.from_values(maxima),
        peak_event=peak_event,
        recomputed_at_peak_bytes=recomputed_at_peak,
        recomputed_max_bytes=recomputed_max,
        aside_peak_bytes=aside_peak,
        start_bytes=start_bytes,
        end_bytes=total,
        modules=_module_rows(records, peak_tick, module_types) if per_module else (),
        timeline=tuple(samples),
        growth=sum_growth((record.producer, record.num_bytes) for record in grown),
    )


def held_at_peak(records: Iterable[StorageRecord], first: int, last: int) -> CategoryBytes:
    """What was live at the highest moment of a stretch.

    Args:
        records: every storage that was ever live.
        first: the tick right after which the stretch begins, its state included.
        last: the last tick of it.

    Returns:
        Bytes by category; among equal moments of the first.
    """
    records = [one for one in records if one.born <= last and (one.died is None or one.died > first)]
    changes = [(max(one.born, first), one.num_bytes) for one in records]
    changes += [(one.died, -one.num_bytes) for one in records if one.died is not None and one.died <= last]
    total = peak = 0
    peak_tick = first
    for tick, moment in groupby(sorted(changes), key=itemgetter(0)):
        total += sum(num_bytes for _, num_bytes in moment)
        if total > peak:
            peak, peak_tick = total, tick
    held: dict[Category, int] = {}
    for one in records:
        if one.live_at(peak_tick):
            held[one.category] = held.get(one.category, 0) + one.num_bytes
    return CategoryBytes(held)


def _sample(index: int, name: str, held: list[int]) -> TimelineEvent:
    return TimelineEvent(index, name, CategoryBytes.from_values(held))


def _module_rows(
    records: Sequence[StorageRecord], peak_tick: int, module_types: Mapping[str, str]
) -> tuple[ModuleMemory, ...]:
    columns = {
        Category.PARAMETERS: "parameters_bytes",
        Category.BUFFERS: "buffers_bytes",
        Category.GRADIENTS: "gradients_bytes",
        Category.OPTIMIZER_STATE: "optimizer_state_bytes",
    }
    rows: dict[str, dict[str, int]] = {}

    def add(module: str, column: str, num_bytes: int) -> None:
        row = rows.setdefault(module, {})
        row[column] = row.get(column, 0) + num_bytes

    for record in records:
        if not record.live_at(peak_tick):
            continue
        if record.category in TRANSIENT:
            add(record.producer, "produced_bytes", record.num_bytes)
            if record.saver is not None:
                add(record.saver, "saved_bytes", record.num_bytes)
        elif record.category in columns:
            add(record.owner or "", columns[record.category], record.num_bytes)
    order = {name: position for position, name in enumerate(module_types)}
    return tuple(
        ModuleMemory(name=name, type_name=module_types.get(name, ""), **row)
        for name, row in sorted(rows.items(), key=lambda item: order.get(item[0], len(order)))
    )


def sum_growth(held: Iterable[tuple[str, int]]) -> tuple[Growth, ...]:
    """Add up what outlived its step, per module, largest first.

    Args:
        held: module path and bytes of each storage.

    Returns:
        One row per module.
    """
    rows: dict[str, list[int]] = {}
    for module, num_bytes in held:
        row = rows.setdefault(module, [0, 0])
        row[0] += num_bytes
        row[1] += 1
    ordered = sorted(rows.items(), key=lambda item: (-item[1][0], item[0]))
    return tuple(Growth(module, num_bytes, count) for module, (num_bytes, count) in ordered)
