"""Recompute activations in backward instead of keeping them: what to recompute, and how to do it exactly."""

from lightning_memtrain.checkpointing import experimental as experimental
from lightning_memtrain.checkpointing.activation_checkpointing import ActivationCheckpointing
from lightning_memtrain.checkpointing.insertion import insert_checkpoints
from lightning_memtrain.checkpointing.memory_budget import MemoryBudget
from lightning_memtrain.checkpointing.named_segments import Segments
from lightning_memtrain.checkpointing.policies import (
    Every,
    Full,
    Modules,
    Nested,
    RecomputationPolicy,
    Recomputed,
    SelectiveOps,
    Sqrt,
)
from lightning_memtrain.checkpointing.selection.plan_recomputation import plan_recomputation
from lightning_memtrain.checkpointing.selection.recomputation_plan import RecomputationPlan

__all__ = [
    "ActivationCheckpointing",
    "Every",
    "Full",
    "MemoryBudget",
    "Modules",
    "Nested",
    "RecomputationPlan",
    "RecomputationPolicy",
    "Recomputed",
    "Segments",
    "SelectiveOps",
    "Sqrt",
    "insert_checkpoints",
    "plan_recomputation",
]
