"""Activations in host memory."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class ActivationsInHostMemory(Switch):
    """What is saved for backward waits for it outside of the GPU."""

    name = "OffloadActivations"
    lowers_state = False

    def is_of_use(self, facts: RunFacts) -> bool:
        """The CPU's activations are in host memory anyway."""
        return facts.on_gpu

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a callback."""
        return (TechniqueSettings("lightning_memtrain.checkpointing.experimental.OffloadActivations"),)
