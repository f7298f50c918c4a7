"""Count live bytes exactly, and lay them beside what the device's allocator says."""

from lightning_memtrain.ledger.device_allocator import (
    AllocatorReading,
    AllocatorStatistics,
    allocator_statistics,
)
from lightning_memtrain.ledger.memory_ledger import MemoryLedger
from lightning_memtrain.ledger.model_devices import parameter_device, parameter_devices
from lightning_memtrain.ledger.operators.allocation_limit import (
    AllocationLimit,
    LimitReached,
    ResultBytes,
)
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.ledger.storage_records import Survivor, sum_growth

__all__ = [
    "AllocationLimit",
    "AllocatorReading",
    "AllocatorStatistics",
    "LimitReached",
    "MemoryLedger",
    "OpWorkspace",
    "ResultBytes",
    "Survivor",
    "allocator_statistics",
    "parameter_device",
    "parameter_devices",
    "sum_growth",
]
