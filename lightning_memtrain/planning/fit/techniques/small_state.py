"""Optimizer state in 8 bits."""

from __future__ import annotations

from importlib.util import find_spec

from lightning_memtrain.planning.fit.techniques.switch import Switch, class_names
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings

_STAND_IN = "lightning_memtrain.planning.fit.trials.stand_ins.StateIn8BitsStandIn"


class StateIn8Bits(Switch):
    """A byte and a little per number for what takes four.

    The optimizer is the user's to choose, so that this is a line for them to write; in a trial it is there.
    """

    name = "optimizer state in 8 bits"
    allow = "8bit-state"

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """What has no state, or one that nobody has in 8 bits."""
        names = class_names(facts)
        if len(facts.optimizers) == 0:
            return "there is no optimizer"
        if "SGD8bit" in names or "AdamW8bit" in names or "Adam8bit" in names:
            return "the optimizer has it already"
        if not names & {"SGD", "Adam", "AdamW"}:
            return "is there for SGD with momentum, Adam and AdamW"
        if names & {"SGD"} and not any(defaults.get("momentum") for _, defaults in facts.optimizers):
            return "needs state, but SGD without momentum has none"
        if names & {"Adam", "AdamW"} and find_spec("bitsandbytes") is None:
            return "needs bitsandbytes, which is not installed: pip install 'lightning-memtrain[bnb]'"
        return ""

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """Nothing that a Trainer takes."""
        return ()

    def by_hand(self, facts: RunFacts) -> tuple[str, ...]:
        """Another optimizer."""
        names = class_names(facts)
        one = "SGD8bit" if "SGD" in names else "adamw8bit" if "AdamW" in names else "adam8bit"
        return (f"return mt.precision.{one}(...)  # from `configure_optimizers`, with the same arguments",)

    def stand_ins(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """A callback that puts the other optimizer into the place of the user's."""
        return (TechniqueSettings(_STAND_IN),)
