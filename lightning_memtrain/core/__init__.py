"""Words that all subpackages of the library share; those that need torch are imported at their first use."""

from typing import TYPE_CHECKING

from lightning_memtrain.compat.first_use import at_first_use
from lightning_memtrain.core.arguments.argument_error import ArgumentError
from lightning_memtrain.core.arguments.byte_sizes import ByteLimit, parse_bytes
from lightning_memtrain.core.breakdown import CodeSite, Growth, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.core.categories import Category, CategoryBytes
from lightning_memtrain.core.technique import Setting, Technique, TechniqueRecord, is_technique
from lightning_memtrain.core.units import GIB, KIB, MIB, format_bytes
from lightning_memtrain.core.warnings import NoEffectWarning, ReportWarning

if TYPE_CHECKING:
    from lightning_memtrain.core.on_demand import OnDemandTensor
    from lightning_memtrain.core.out_of_memory import (
        OutOfReach,
        does_not_fit,
        is_out_of_memory,
        release_memory,
        without_frames,
    )
else:
    __getattr__ = at_first_use(
        __name__,
        {
            "OnDemandTensor": "on_demand",
            "OutOfReach": "out_of_memory",
            "does_not_fit": "out_of_memory",
            "is_out_of_memory": "out_of_memory",
            "release_memory": "out_of_memory",
            "without_frames": "out_of_memory",
        },
    )

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "ArgumentError",
    "ByteLimit",
    "Category",
    "CategoryBytes",
    "CodeSite",
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
