"""Steps of an optimizer taken apart: one parameter at a time, with what the optimizer shares among them."""

from lightning_memtrain.optimizer_steps.parameter_steps import SupportsParameterStep, step_parameter
from lightning_memtrain.optimizer_steps.reindexing import SupportsReindexing

__all__ = ["SupportsParameterStep", "SupportsReindexing", "step_parameter"]
