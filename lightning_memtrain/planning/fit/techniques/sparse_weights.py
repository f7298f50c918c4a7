"""Few weights."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings

_METHOD = {"class_path": "lightning_memtrain.sparsity.RigL", "init_args": {"sparsity": 0.9}}


class FewWeights(Switch):
    """One weight in ten, and its gradient and state."""

    name = "SparseTraining"
    allow = "sparsity"

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """Its pattern changes by the values of weights, which trials on the CPU do not have."""
        return "" if facts.on_gpu else "what a change of its pattern takes is not known on the CPU"

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a callback."""
        return (TechniqueSettings("lightning_memtrain.SparseTraining", {"method": dict(_METHOD)}),)
