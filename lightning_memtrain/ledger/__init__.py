"""Count live bytes exactly, and lay them beside what the device's allocator says."""

from lightning_memtrain.ledger.devices import parameter_device, parameter_devices
from lightning_memtrain.ledger.limit import AllocationLimit, LimitReached, ResultBytes
from lightning_memtrain.ledger.memory_ledger import MemoryLedger
from lightning_memtrain.ledger.records import Survivor, sum_growth
from lightning_memtrain.ledger.truth import DeviceTruth, TruthReading, device_truth
from lightning_memtrain.ledger.workspace import OpWorkspace

__all__ = [
    "AllocationLimit",
    "DeviceTruth",
    "LimitReached",
    "MemoryLedger",
    "OpWorkspace",
    "ResultBytes",
    "Survivor",
    "TruthReading",
    "device_truth",
    "parameter_device",
    "parameter_devices",
    "sum_growth",
]
