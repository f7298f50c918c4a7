"""What a snapshot says: how much was allocated and reserved when, what held most, what was missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_memtrain.report.cuda_snapshot.document import DeviceSnapshot, Frames, own_frames
from lightning_memtrain.tracing.allocator import Comparison, Replay, SegmentRecord, settings_of
from lightning_memtrain.tracing.allocator.events import (
    ALLOC,
    ALLOCATED,
    FREE_REQUESTED,
    INACTIVE,
    OUT_OF_MEMORY,
)


@dataclass(frozen=True)
class LiveBlock:
    """A block that was allocated at the moment that a summary looks at.

    Args:
        num_bytes: its bytes.
        event: position of the event that allocated it, ``None`` if that was before the recording.
        frames: the call stack that allocated it, empty if none was recorded.
    """

    num_bytes: int
    event: int | None
    frames: Frames


@dataclass(frozen=True)
class CallSite:
    """All blocks of that moment that one call stack allocated.

    Args:
        num_bytes: their bytes.
        num_blocks: how many there are.
        frames: the call stack, empty if none was recorded.
    """

    num_bytes: int
    num_blocks: int
    frames: Frames


@dataclass(frozen=True)
class Fragmentation:
    """Reserved bytes that no block in use has.

    Args:
        free_bytes: bytes of free blocks.
        num_free_blocks: how many there are.
        largest_free_bytes: bytes of the largest.
        returnable_bytes: free bytes that `torch.cuda.empty_cache` would give back.
        rounding_bytes: bytes that blocks in use have beyond what was asked for.
    """

    free_bytes: int
    num_free_blocks: int
    largest_free_bytes: int
    returnable_bytes: int
    rounding_bytes: int

    @property
    def stuck_bytes(self) -> int:
        """Free bytes in segments that are in use, too: of use only to blocks that fit into them."""
        return self.free_bytes - self.returnable_bytes


@dataclass(frozen=True)
class Shortage:
    """What an allocation that failed was short of.

    Args:
        event: position of the event.
        requested_bytes: what was asked for.
        needed_bytes: what the allocator would have taken from the device for it.
        device_free_bytes: what the device had left, ``None`` if that was not recorded.
        allocated_bytes: what blocks in use held.
        reserved_bytes: what the allocator had from the device.
        largest_free_bytes: bytes of the largest free block of its stream and pool.
        frames: the call stack that asked.
    """

    event: int
    requested_bytes: int
    needed_bytes: int
    device_free_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int
    largest_free_bytes: int
    frames: Frames

    @property
    def short_bytes(self) -> int | None:
        """How much more the device would have needed, ``None`` if what it had left was not recorded."""
        return None if self.device_free_bytes is None else self.needed_bytes - self.device_free_bytes


@dataclass(frozen=True)
class SnapshotSummary:
    """What a snapshot says of one device.

    Args:
        index: number of the device.
        allocated_bytes: bytes of blocks in use after each event; the first is before all of them.
        reserved_bytes: bytes that the allocator had from the device, likewise.
        peak_event: position in these of the first moment when most was allocated.
        focus_event: position in these of the moment to look at: the last allocation that failed, else the
            peak.
        live: the largest blocks at that moment, largest first.
        call_sites: all blocks at that moment by the call stack that allocated them, largest first.
        fragmentation: of the end.
        shortages: one for each allocation that failed.
        comparison: how the model of the allocator did beside the real one; sizes of blocks are its own.
        not_modelled: why the model does not know the settings that were in force, ``""`` if it does.
    """

    index: int
    allocated_bytes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    peak_event: int
    focus_event: int
    live: tuple[LiveBlock, ...]
    call_sites: tuple[CallSite, ...]
    fragmentation: Fragmentation
    shortages: tuple[Shortage, ...]
    comparison: Comparison
    not_modelled: str

    @property
    def peak_allocated_bytes(self) -> int:
        """Most bytes that blocks in use had."""
        return self.allocated_bytes[self.peak_event]

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes that the allocator had from the device."""
        return max(self.reserved_bytes)


def summarize(
    device: DeviceSnapshot, allocator_settings: Mapping[str, Any], *, max_rows: int = 20
) -> SnapshotSummary:
    """Read a device's part of a snapshot.

    Args:
        device: the part.
        allocator_settings: of the snapshot.
        max_rows: most blocks and most call sites, at least 1.

    Returns:
        What it says.
    """
    settings, not_modelled = settings_of(device.events, device.segments, allocator_settings)
    run = Replay(device.events, device.segments, settings)
    allocated, reserved = [run.allocator.allocated_bytes], [run.real_reserved_bytes]
    sizes: dict[int, int] = {}
    shortages = []
    for position, event in enumerate(device.events):
        run.step(event)
        if event.action == ALLOC:
            sizes[position] = run.blocks[event.address].size
        elif event.action == OUT_OF_MEMORY:
            size = settings.block_bytes(event.size)
            shortages.append(
                Shortage(
                    event=position,
                    requested_bytes=event.size,
                    needed_bytes=settings.segment_bytes(size),
                    device_free_bytes=device.device_free.get(position),
                    allocated_bytes=run.allocator.allocated_bytes,
                    reserved_bytes=run.real_reserved_bytes,
                    largest_free_bytes=run.allocator.largest_free_bytes(size, event.stream),
                    frames=device.frames[position],
                )
            )
        allocated.append(run.allocator.allocated_bytes)
        reserved.append(run.real_reserved_bytes)
    peak = max(range(len(allocated)), key=allocated.__getitem__)
    focus = shortages[-1].event if shortages else peak
    live = _live(device, run.start, sizes, focus)
    return SnapshotSummary(
        index=device.index,
        allocated_bytes=tuple(allocated),
        reserved_bytes=tuple(reserved),
        peak_event=peak,
        focus_event=focus,
        live=tuple(live[:max_rows]),
        call_sites=tuple(_call_sites(live)[:max_rows]),
        fragmentation=_fragmentation(device.segments),
        shortages=tuple(shortages),
        comparison=run.comparison,
        not_modelled=not_modelled,
    )


def _live(
    device: DeviceSnapshot, start: tuple[SegmentRecord, ...], sizes: Mapping[int, int], moment: int
) -> list[LiveBlock]:
    """The blocks in use after the first ``moment`` events, largest first."""
    # Who allocated what was there before the recording is known of what is still there at its end.
    touched = {event.address for event in device.events if event.action in (ALLOC, FREE_REQUESTED)}
    live: dict[int, LiveBlock] = {}
    for segment in start:
        for block in segment.blocks:
            if block.state == ALLOCATED:
                frames = () if block.address in touched else device.block_frames.get(block.address, ())
                live[block.address] = LiveBlock(block.size, None, frames)
    for position, event in enumerate(device.events[:moment]):
        if event.action == ALLOC:
            live[event.address] = LiveBlock(sizes[position], position, device.frames[position])
        elif event.action == FREE_REQUESTED:
            live.pop(event.address, None)
    return sorted(live.values(), key=lambda block: -block.num_bytes)


def _call_sites(live: list[LiveBlock]) -> list[CallSite]:
    sizes: dict[Frames, list[int]] = {}
    for block in live:
        sizes.setdefault(own_frames(block.frames), []).append(block.num_bytes)
    sites = [CallSite(sum(of_site), len(of_site), frames) for frames, of_site in sizes.items()]
    return sorted(sites, key=lambda site: -site.num_bytes)


def _fragmentation(segments: tuple[SegmentRecord, ...]) -> Fragmentation:
    blocks = [block for segment in segments for block in segment.blocks]
    free = [block.size for block in blocks if block.state == INACTIVE]
    whole = [s.size for s in segments if all(block.state == INACTIVE for block in s.blocks)]
    return Fragmentation(
        free_bytes=sum(free),
        num_free_blocks=len(free),
        largest_free_bytes=max(free, default=0),
        returnable_bytes=sum(whole),
        rounding_bytes=sum(block.size - block.requested_size for block in blocks if block.state != INACTIVE),
    )
