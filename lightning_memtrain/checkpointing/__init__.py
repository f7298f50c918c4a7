"""Recompute activations in backward instead of keeping them: what to recompute, and how to do it exactly."""

from lightning_memtrain.checkpointing.activation_checkpointing import ActivationCheckpointing
from lightning_memtrain.checkpointing.experimental.activation_offloading import OffloadActivations
from lightning_memtrain.checkpointing.insertion import insert_checkpoints
from lightning_memtrain.checkpointing.policies import (
    Budget,
    CheckpointPolicy,
    Every,
    Full,
    Modules,
    Nested,
    Recomputed,
    SelectiveOps,
    Sqrt,
)

__all__ = [
    "ActivationCheckpointing",
    "Budget",
    "CheckpointPolicy",
    "Every",
    "Full",
    "Modules",
    "Nested",
    "OffloadActivations",
    "Recomputed",
    "SelectiveOps",
    "Sqrt",
    "insert_checkpoints",
]
