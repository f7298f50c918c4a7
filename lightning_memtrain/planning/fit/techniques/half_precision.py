"""Weights in bfloat16."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class WeightsInBfloat16(Switch):
    """Weights, gradients and activations in 2 bytes a number."""

    name = 'LowPrecision("bf16-true")'
    allow = "bf16"

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """None that is known before it is tried."""
        return ""

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a precision plugin."""
        return (TechniqueSettings("lightning_memtrain.LowPrecision", {"precision": "bf16-true"}, "plugins"),)
