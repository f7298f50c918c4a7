"""Words that all subpackages of the library share."""

from lightning_memtrain.core.arguments.argument_error import ArgumentError
from lightning_memtrain.core.arguments.byte_sizes import ByteLimit, parse_bytes
from lightning_memtrain.core.breakdown import Growth, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.core.categories import Category, CategoryBytes
from lightning_memtrain.core.on_demand import OnDemandTensor
from lightning_memtrain.core.out_of_memory import (
    OutOfReach,
    does_not_fit,
    is_out_of_memory,
    release_memory,
    without_frames,
)
from lightning_memtrain.core.technique import Setting, Technique, TechniqueRecord, is_technique
from lightning_memtrain.core.units import GIB, KIB, MIB, format_bytes
from lightning_memtrain.core.warnings import NoEffectWarning, ReportWarning

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "ArgumentError",
    "ByteLimit",
    "Category",
    "CategoryBytes",
    "Growth",
    "MemoryBreakdown",
    "ModuleMemory",
    "NoEffectWarning",
    "OnDemandTensor",
    "OutOfReach",
    "ReportWarning",
    "Setting",
    "Technique",
    "TechniqueRecord",
    "TimelineEvent",
    "does_not_fit",
    "format_bytes",
    "is_out_of_memory",
    "is_technique",
    "parse_bytes",
    "release_memory",
    "without_frames",
]
