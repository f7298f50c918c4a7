"""Activations in few bits."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class ActivationsIn8Bits(Switch):
    """What is saved for backward takes a byte a number."""

    name = "CompressedActivations"
    allow = "compressed-activations"
    instead_of = "CompressedActivations"
    replaces_recomputation = True
    lowers_state = False

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a callback."""
        return (TechniqueSettings("lightning_memtrain.CompressedActivations"),)


class ActivationsIn4Bits(Switch):
    """What is saved for backward takes half a byte a number."""

    name = "CompressedActivations, 4 bits"
    allow = "compressed-activations"
    instead_of = "CompressedActivations"
    replaces_recomputation = True
    lowers_state = False

    @property
    def changes(self) -> str:
        """More than 8 bits do."""
        return "gradients are those of activations rounded to 4 bits; what that costs nobody has measured"

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a callback."""
        codec = {"class_path": "lightning_memtrain.precision.ActivationCodec", "init_args": {"bits": 4}}
        return (TechniqueSettings("lightning_memtrain.CompressedActivations", {"codec": codec}),)
