"""The sentences that terminal and page have in common."""

from __future__ import annotations

from lightning_memtrain.core import format_bytes
from lightning_memtrain.report.cuda_snapshot.document import Frames, own_frames
from lightning_memtrain.report.cuda_snapshot.summary import Shortage, SnapshotSummary

BEFORE = "before the recording"
UNKNOWN = "no call stack was recorded"


def focus(summary: SnapshotSummary) -> str:
    """Name the moment that blocks and call stacks are of."""
    return "when memory ran out" if summary.shortages else "at the peak"


def share(num_bytes: int, summary: SnapshotSummary) -> str:
    """What is allocated of all that is allocated at that moment."""
    return f"{num_bytes / max(summary.allocated_bytes[summary.focus_event], 1):.1%}"


def where(frames: Frames, *, max_frames: int = 3) -> str:
    """Name the place that a call stack leads to.

    Args:
        frames: the call stack, innermost first.
        max_frames: most lines of it.

    Returns:
        Its own innermost lines.
    """
    return " < ".join(map(str, own_frames(frames)[:max_frames])) or UNKNOWN


def shortage(failure: Shortage) -> str:
    """Tell what an allocation that failed was short of."""
    sentence = f"{format_bytes(failure.requested_bytes)} were asked for, for which the allocator takes "
    sentence += f"{format_bytes(failure.needed_bytes)} from the device"
    if failure.device_free_bytes is not None and failure.short_bytes is not None:
        sentence += f", which had {format_bytes(failure.device_free_bytes)} left"
        if failure.short_bytes > 0:
            sentence += f": {format_bytes(failure.short_bytes)} too little"
    reserved, allocated = failure.reserved_bytes, failure.allocated_bytes
    return (
        f"{sentence}. Of {format_bytes(reserved)} reserved, {format_bytes(allocated)} were allocated and "
        f"{format_bytes(reserved - allocated)} were not; the largest free block that it could have had was "
        f"{format_bytes(failure.largest_free_bytes)}."
    )


def free_at_end(summary: SnapshotSummary) -> str:
    """Tell what is reserved at the end and not in use, and why."""
    free = summary.fragmentation
    blocks = f"{free.num_free_blocks:,} {'block' if free.num_free_blocks == 1 else 'blocks'}"
    return (
        f"Free at the end: {format_bytes(free.free_bytes)} in {blocks}, the largest "
        f"{format_bytes(free.largest_free_bytes)}. empty_cache() would give back "
        f"{format_bytes(free.returnable_bytes)}; {format_bytes(free.stuck_bytes)} lie between blocks in use. "
        f"Rounding up takes {format_bytes(free.rounding_bytes)} of the blocks in use."
    )


def certainty(summary: SnapshotSummary) -> str:
    """Tell how far the bytes of single blocks can be relied on."""
    comparison = summary.comparison
    if summary.not_modelled:
        return f"Bytes of blocks may be off, by a setting that was in force: {summary.not_modelled}"
    if comparison.num_same_address == comparison.num_allocations:
        return "Bytes of blocks are exact: the model of the allocator puts each at its real address."
    share = f"{comparison.same_address_share:.1%}"
    return (
        f"Bytes of blocks may be off by what is left of a block that is not split, at most 1 MiB each: the "
        f"model of the allocator puts {share} at their real address."
    )
