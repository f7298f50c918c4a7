"""Optimizer state in 8 bits."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch, class_names
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class StateIn8Bits(Switch):
    """The optimizer is the user's to choose, so this is offered in words only."""

    name = "optimizer state in 8 bits"
    allow = "8bit-state"

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """It takes another optimizer, which `configure_optimizers` must return."""
        one = "SGD8bit" if "SGD" in class_names(facts) else "adamw8bit"
        return (
            f"takes another optimizer: return mt.precision.{one}(...) from `configure_optimizers`, then plan "
            "again"
        )

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """Nothing that a Trainer takes."""
        return ()
