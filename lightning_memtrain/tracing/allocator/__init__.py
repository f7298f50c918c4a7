"""A model of torch's caching allocator: what is reserved, and where blocks lie, without a device."""

from lightning_memtrain.tracing.allocator.caching_allocator import CachingAllocator, DeviceFull
from lightning_memtrain.tracing.allocator.events import AllocatorEvent, BlockRecord, SegmentRecord
from lightning_memtrain.tracing.allocator.replay import Comparison, Replay, replay, settings_of
from lightning_memtrain.tracing.allocator.settings import AllocatorSettings
from lightning_memtrain.tracing.allocator.start_state import start_state

__all__ = [
    "AllocatorEvent",
    "AllocatorSettings",
    "BlockRecord",
    "CachingAllocator",
    "Comparison",
    "DeviceFull",
    "Replay",
    "SegmentRecord",
    "replay",
    "settings_of",
    "start_state",
]
