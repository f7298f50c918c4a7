"""Optimizer in backward: each parameter is stepped, and its gradient freed, as soon as the gradient is there."""

from lightning_memtrain.techniques.optimizer_in_backward.accumulation import Accumulation, AdamA, ExactMomentum
from lightning_memtrain.techniques.optimizer_in_backward.callback import OptimizerInBackward

__all__ = ["Accumulation", "AdamA", "ExactMomentum", "OptimizerInBackward"]
