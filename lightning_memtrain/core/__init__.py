"""Words that all rooms of the library share."""

from lightning_memtrain.core.breakdown import Growth, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.core.categories import Category, CategoryBytes
from lightning_memtrain.core.units import GIB, KIB, MIB, format_bytes
from lightning_memtrain.core.warnings import NoEffectWarning, ReportWarning

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "Category",
    "CategoryBytes",
    "Growth",
    "MemoryBreakdown",
    "ModuleMemory",
    "NoEffectWarning",
    "ReportWarning",
    "TimelineEvent",
    "format_bytes",
]
