"""Writes snapshots in torch's format, for memory_viz and whatever else reads them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_memtrain.core import Category, MemoryBreakdown
from lightning_memtrain.report.cuda_snapshot.document import Frame, Frames
from lightning_memtrain.tracing.allocator import AllocatorEvent, AllocatorSettings, BlockRecord, SegmentRecord
from lightning_memtrain.tracing.allocator.events import (
    ALLOC,
    ALLOCATED,
    FREE_COMPLETED,
    FREE_REQUESTED,
    INACTIVE,
    OUT_OF_MEMORY,
)
from lightning_memtrain.tracing.allocator.settings import round_up

# memory_viz reads protocols 2 to 4, whatever Python writes by default.
_PROTOCOL = 4
# Segments of categories begin at multiples of this.
_GRAIN_BYTES = 2 * 2**20


def snapshot_of_events(
    events: Sequence[AllocatorEvent],
    segments: Sequence[SegmentRecord],
    *,
    frames: Sequence[Frames] = (),
    categories: Sequence[str | None] = (),
    device_free: int = 0,
    settings: AllocatorSettings | None = None,
) -> dict[str, Any]:
    """Put what an allocator did into the form of ``torch.cuda.memory._snapshot()``.

    Args:
        events: what it did, in order.
        segments: what it had from the device after them.
        frames: the call stack of each event; ``()`` for none.
        categories: what each event's bytes are for, by which memory_viz chooses colours; ``()`` for none.
        device_free: bytes that the device had left where an allocation failed.
        settings: those of the allocator, ``None`` for torch's defaults.

    Returns:
        Plain dictionaries, lists, texts and numbers.
    """
    stacks = [_plain(one) for one in frames] or [[] for _ in events]
    trace: list[dict[str, Any]] = []
    made: dict[int, list[dict[str, Any]]] = {}
    for position, (event, stack) in enumerate(zip(events, stacks, strict=True)):
        entry = {**_entry(event), "frames": stack}
        if event.action == OUT_OF_MEMORY:
            entry["device_free"] = device_free
        if categories and categories[position] is not None:
            entry["category"] = categories[position]
        if event.action == ALLOC:
            made[event.address] = stack
        trace.append(entry)
    total = sum(block.size for segment in segments for block in segment.blocks if block.state != INACTIVE)
    end: dict[str, Any] = {"action": "snapshot", "addr": 0, "size": total, "stream": 0, "frames": []}
    if categories:
        # Without an entry of this category memory_viz fails (it misspells the list it would add it to).
        end["category"] = "unknown"
    return {
        "segments": [_segment(segment, made) for segment in segments],
        "device_traces": [[*trace, end]],
        "allocator_settings": _settings(settings or AllocatorSettings()),
    }


def snapshot_of_breakdown(breakdown: MemoryBreakdown) -> dict[str, Any]:
    """Put the timeline of a step into the form of ``torch.cuda.memory._snapshot()``.

    Each category is a segment of its own, as large as the most that it held. What it grows by from one event
    of the timeline to the next is an allocation, whose call stack names the event; what it shrinks by is
    freed, the latest first. So the bytes after each event are exact; a block stands for no single tensor.

    Args:
        breakdown: a step that has a timeline.

    Returns:
        Plain dictionaries, lists, texts and numbers.
    """
    told: list[_Told] = []
    piles: dict[Category, _Pile] = {}
    base = _GRAIN_BYTES
    for category in Category:
        most = max((moment.held[category] for moment in breakdown.timeline), default=0)
        if most > 0 and category is not Category.WORKSPACE:  # which is known at the peak only
            piles[category] = _Pile(category, base, most)
            base += round_up(most, _GRAIN_BYTES)
    for moment in breakdown.timeline:
        changes = {category: moment.held[category] - pile.size for category, pile in piles.items()}
        # What goes before what comes, so that no sum in between is above both.
        for category in sorted(changes, key=changes.__getitem__):
            frame = Frame(category.value, moment.index, moment.name)
            told += piles[category].change(changes[category], frame)
    return snapshot_of_events(
        [one.event for one in told],
        [pile.segment() for pile in piles.values()],
        frames=[(one.frame,) for one in told],
        categories=[one.category.value for one in told],
    )


def write_snapshot(data: dict[str, Any], path: Path) -> None:
    """Write a snapshot as torch writes it; an older file at ``path`` is replaced in one move.

    Args:
        data: what `snapshot_of_events` or `snapshot_of_breakdown` returned.
        path: the file to write; its folder is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            pickle.dump(data, file, protocol=_PROTOCOL)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _plain(frames: Frames) -> list[dict[str, Any]]:
    return [frame._asdict() for frame in frames]


def _entry(event: AllocatorEvent) -> dict[str, Any]:
    # An allocation that failed has no address.
    address = {} if event.action == OUT_OF_MEMORY else {"addr": event.address}
    return {"action": event.action, **address, "size": event.size, "stream": event.stream}


def _segment(segment: SegmentRecord, made: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    used = [block for block in segment.blocks if block.state != INACTIVE]
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": sum(block.size for block in used if block.state == ALLOCATED),
        "active_size": sum(block.size for block in used),
        "requested_size": sum(block.requested_size for block in used),
        "stream": segment.stream,
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.expandable,
        "frames": [],
        "blocks": [
            {**block._asdict(), "frames": made.get(block.address, []) if block.state != INACTIVE else []}
            for block in segment.blocks
        ],
    }


def _settings(settings: AllocatorSettings) -> dict[str, Any]:
    limit = settings.max_split_size_bytes
    return {
        "expandable_segments": settings.expandable_segments,
        "max_split_size": -1 if limit is None else limit,
        "garbage_collection_threshold": 0.0,
        "roundup_power2_divisions": {
            str(power // 2**20): divisions for power, divisions in settings.roundup_power2_divisions
        },
    }


class _Told(NamedTuple):
    """An event of a category, and the moment of the timeline that it stands for."""

    event: AllocatorEvent
    frame: Frame
    category: Category


class _Pile:
    """The bytes of one category: what comes lies on top of what is there, and goes before it."""

    def __init__(self, category: Category, base: int, most: int) -> None:
        self.size = 0
        self._category = category
        self._base = base
        self._most = most
        self._held: list[_Told] = []

    def change(self, num_bytes: int, frame: Frame) -> Iterator[_Told]:
        while num_bytes < 0:
            top = self._held.pop()
            self.size -= top.event.size
            num_bytes += top.event.size
            for action in (FREE_REQUESTED, FREE_COMPLETED):
                yield top._replace(event=top.event._replace(action=action))
            if num_bytes > 0:  # a part of it stays what it was
                frame = top.frame
        if num_bytes > 0:
            event = AllocatorEvent(ALLOC, self._base + self.size, num_bytes)
            self._held.append(_Told(event, frame, self._category))
            self.size += num_bytes
            yield self._held[-1]

    def segment(self) -> SegmentRecord:
        """A segment that has room for the most that there ever was."""
        events = [told.event for told in self._held]
        blocks = [BlockRecord(event.address, event.size, event.size, ALLOCATED) for event in events]
        if self.size < self._most:
            blocks.append(BlockRecord(self._base + self.size, self._most - self.size, 0, INACTIVE))
        return SegmentRecord(self._base, self._most, 0, False, False, tuple(blocks))
