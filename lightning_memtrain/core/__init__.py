"""Words that all rooms of the library share."""

from lightning_memtrain.core.breakdown import Growth, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.core.categories import Category, CategoryBytes
from lightning_memtrain.core.indexed_state import ReindexesState
from lightning_memtrain.core.marks import mark, watch_marks
from lightning_memtrain.core.out_of_memory import is_out_of_memory
from lightning_memtrain.core.rehearsal import rehearsal, rehearsal_depth
from lightning_memtrain.core.technique import Setting, Technique, TechniqueRecord, is_technique
from lightning_memtrain.core.units import GIB, KIB, MIB, format_bytes, parse_bytes
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
    "ReindexesState",
    "ReportWarning",
    "Setting",
    "Technique",
    "TechniqueRecord",
    "TimelineEvent",
    "format_bytes",
    "is_out_of_memory",
    "is_technique",
    "mark",
    "parse_bytes",
    "rehearsal",
    "rehearsal_depth",
    "watch_marks",
]
