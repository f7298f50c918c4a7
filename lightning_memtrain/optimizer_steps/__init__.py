"""Steps of an optimizer in parts: one parameter at a time, and whether an optimizer allows that."""

from lightning_memtrain.optimizer_steps.parameter_steps import (
    SupportsParameterStep,
    step_parameter,
    step_parameters,
)
from lightning_memtrain.optimizer_steps.partial_steps import why_no_partial_steps
from lightning_memtrain.optimizer_steps.reindexing import SupportsReindexing
from lightning_memtrain.optimizer_steps.shared_state import SharedState

__all__ = [
    "SharedState",
    "SupportsParameterStep",
    "SupportsReindexing",
    "step_parameter",
    "step_parameters",
    "why_no_partial_steps",
]
