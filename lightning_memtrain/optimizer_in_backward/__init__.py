"""Optimizer in backward: a parameter is stepped, and its gradient freed, as soon as that is complete."""

from lightning_memtrain.optimizer_in_backward.backward_steps import BackwardSteps
from lightning_memtrain.optimizer_in_backward.gradient_accumulation import Accumulation, AdamA, ExactMomentum
from lightning_memtrain.optimizer_in_backward.optimizer_in_backward import OptimizerInBackward
from lightning_memtrain.optimizer_in_backward.step_in_backward import step_in_backward

__all__ = [
    "Accumulation",
    "AdamA",
    "BackwardSteps",
    "ExactMomentum",
    "OptimizerInBackward",
    "step_in_backward",
]
