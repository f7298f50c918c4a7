"""Computing in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings

_WHOLE = ("32-true", "32", 32)


class _InBfloat16(Switch):
    allow = "bf16"
    instead_of = "precision"

    def is_of_use(self, facts: RunFacts) -> bool:
        """Weights that are in 2 bytes a number compute so anyway."""
        return facts.has_float32

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """A run has one precision."""
        return "" if facts.precision in _WHOLE else f"the run has a precision already, {facts.precision}"


class WeightsInBfloat16(_InBfloat16):
    """Weights, gradients and activations in 2 bytes a number."""

    name = 'LowPrecision("bf16-true")'

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a precision plugin."""
        return (TechniqueSettings("lightning_memtrain.LowPrecision", {"precision": "bf16-true"}, "plugins"),)


class ComputesInBfloat16(_InBfloat16):
    """Most activations in 2 bytes a number; weights and their gradients stay in float32."""

    name = 'precision="bf16-mixed"'

    @property
    def changes(self) -> str:
        """Weights keep their bits."""
        return "computes in bfloat16, which keeps 8 bits of a number, with weights in float32"

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """Lightning has it by itself."""
        return ()

    def trainer_arguments(self, facts: RunFacts) -> Mapping[str, Any]:
        """As Lightning calls it."""
        return {"precision": "bf16-mixed"}
