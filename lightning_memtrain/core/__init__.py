"""Words that all rooms of the library share."""

from lightning_memtrain.core.asides import aside, watch_asides
from lightning_memtrain.core.breakdown import Growth, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.core.categories import Category, CategoryBytes
from lightning_memtrain.core.gradient_sync import on_gradient_sync, sync_gradients
from lightning_memtrain.core.indexed_state import ReindexesState
from lightning_memtrain.core.marks import mark, watch_marks
from lightning_memtrain.core.on_demand import OnDemandTensor
from lightning_memtrain.core.out_of_memory import (
    OutOfReach,
    does_not_fit,
    is_out_of_memory,
    release_memory,
    without_frames,
)
from lightning_memtrain.core.rehearsal import rehearsal, rehearsal_depth
from lightning_memtrain.core.snapshots import Kept, keep_all, on_snapshot
from lightning_memtrain.core.stepping import StepsParameters, step_parameter
from lightning_memtrain.core.technique import Setting, Technique, TechniqueRecord, is_technique
from lightning_memtrain.core.training_step import wrap_training_step
from lightning_memtrain.core.units import GIB, KIB, MIB, format_bytes, parse_bytes
from lightning_memtrain.core.warnings import NoEffectWarning, ReportWarning
from lightning_memtrain.core.windows import backward_is_partial, partial_backward

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "Category",
    "CategoryBytes",
    "Growth",
    "Kept",
    "MemoryBreakdown",
    "ModuleMemory",
    "NoEffectWarning",
    "OnDemandTensor",
    "OutOfReach",
    "ReindexesState",
    "ReportWarning",
    "Setting",
    "StepsParameters",
    "Technique",
    "TechniqueRecord",
    "TimelineEvent",
    "aside",
    "backward_is_partial",
    "does_not_fit",
    "format_bytes",
    "is_out_of_memory",
    "is_technique",
    "keep_all",
    "mark",
    "on_gradient_sync",
    "on_snapshot",
    "parse_bytes",
    "partial_backward",
    "rehearsal",
    "rehearsal_depth",
    "release_memory",
    "step_parameter",
    "sync_gradients",
    "watch_asides",
    "watch_marks",
    "without_frames",
    "wrap_training_step",
]
