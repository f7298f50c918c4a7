"""Gradients freed before the next forward."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class GradientsFreedEarly(Switch):
    """Lightning frees the gradients of a step after the next forward; microbatches do so before it.

    One microbatch of the whole batch does nothing else, and costs nothing.
    """

    name = "Microbatching(num_microbatches=1)"

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """A module that steps by itself frees its gradients by itself."""
        return "" if facts.automatic_optimization else "needs automatic optimization"

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """Where there are several microbatches, they do it already."""
        if num_chunks > 1:
            return ()
        return (TechniqueSettings("lightning_memtrain.Microbatching", {"num_microbatches": 1}),)
