"""Snapshots of CUDA memory as torch writes them, made without a device."""

from __future__ import annotations

from typing import Any

from lightning_memtrain.core import MIB
from lightning_memtrain.report.cuda_snapshot import Frame, snapshot_of_events
from lightning_memtrain.tracing.allocator import AllocatorEvent, CachingAllocator, DeviceFull

FORWARD = (
    Frame("??", 0, "at::native::empty_cuda(...)"),
    Frame("/venv/site-packages/torch/nn/modules/linear.py", 134, "forward"),
    Frame("/home/me/model.py", 12, "forward"),
    Frame("/home/me/train.py", 40, "main"),
)
STEP = (Frame("/home/me/train.py", 44, "main"),)


def snapshot_data() -> dict[str, Any]:
    """Two layers and a batch on a device of 100 MiB, and a third layer that does not fit.

    Before the recording 8 MiB were allocated by ``STEP``; ``FORWARD`` allocates 30 and 25 MiB, 1,000
    bytes and 9 MiB on another stream, and lets go of the 25 and the 9; then 60 MiB do not fit.
    """
    events: list[AllocatorEvent] = []
    allocator = CachingAllocator(limit_bytes=100 * MIB, observer=events.append)
    allocator.allocate(8 * MIB)
    num_before = len(events)
    allocator.allocate(30 * MIB)
    second = allocator.allocate(25 * MIB - 100)
    allocator.allocate(1000)
    allocator.free(allocator.allocate(9 * MIB, stream=7))
    allocator.free(second)
    try:
        allocator.allocate(60 * MIB)
    except DeviceFull as failure:
        device_free = failure.limit_bytes - failure.reserved_bytes
    frames = [STEP if position < num_before else FORWARD for position in range(len(events))]
    data = snapshot_of_events(events, allocator.segments(), frames=frames, device_free=device_free)
    data["device_traces"][0] = data["device_traces"][0][num_before:]
    return data
