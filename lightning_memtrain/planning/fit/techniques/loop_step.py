"""Optimizers that step one parameter after the other."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings

_STAND_IN = "lightning_memtrain.planning.fit.trials.stand_ins.LoopStepStandIn"


class StepsInALoop(Switch):
    """Torch's optimizers make temporaries as large as all parameters, on a GPU by default (`foreach`)."""

    name = "optimizer with foreach=False"
    instead_of = "optimizer"
    lowers_state = False

    def is_of_use(self, facts: RunFacts) -> bool:
        """Only `foreach` makes them."""
        return facts.takes_all_at_once

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """Nothing that a Trainer takes."""
        return ()

    def by_hand(self, facts: RunFacts) -> tuple[str, ...]:
        """An argument of the optimizer."""
        name = facts.optimizers[0][0][0] if facts.optimizers else "AdamW"
        return (f"return torch.optim.{name}(..., foreach=False)  # from `configure_optimizers`",)

    def stand_ins(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """A callback that sets the argument."""
        return (TechniqueSettings(_STAND_IN),)
