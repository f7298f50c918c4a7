"""Activations in 8 bits."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class ActivationsIn8Bits(Switch):
    """What is saved for backward takes a byte a number."""

    name = "CompressedActivations"
    allow = "compressed-activations"

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """None that is known before it is tried."""
        return ""

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a callback."""
        return (TechniqueSettings("lightning_memtrain.precision.CompressedActivations"),)
