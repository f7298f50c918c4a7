"""The optimizer's step within backward."""

from __future__ import annotations

from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings

_MOMENTUM = {"class_path": "lightning_memtrain.optimizer_in_backward.ExactMomentum"}


class StepsInBackward(Switch):
    """Gradients never exist together."""

    name = "OptimizerInBackward"
    frees_gradients = True
    may_be_timed = False

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """With several chunks gradients have to be added up to something."""
        if not facts.automatic_optimization:
            return "needs automatic optimization: the module steps its optimizers itself"
        if num_chunks > 1 and not all(_has_momentum(defaults) for _, defaults in facts.optimizers):
            return "adds up gradients of several microbatches exactly for SGD with plain momentum only"
        return ""

    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """As a callback."""
        arguments = {"accumulation": _MOMENTUM} if num_chunks > 1 else {}
        return (TechniqueSettings("lightning_memtrain.OptimizerInBackward", arguments),)


def _has_momentum(defaults: object) -> bool:
    if not isinstance(defaults, dict) or defaults.get("nesterov"):
        return False
    momentum = defaults.get("momentum")
    return isinstance(momentum, float) and momentum > 0
