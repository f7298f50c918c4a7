"""A technique as the planner knows it: what it asks of a run, and how it is written into a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class Switch(ABC):
    """A technique that is on or off, beside microbatches and recomputation.

    A subclass says when it can be used and how it is written. What it saves, what it costs and whether it is
    exact is found out by running it on tensors without data, so there is no formula here. One that says by
    its :attr:`~lightning_memtrain.core.Technique.exact` that it changes the result is used only if ``allow``
    names what it changes.

    Example:
        >>> class CompressBy4(Switch):
        ...     name = "CompressedActivations, 4 bits"
        ...     allow = "compressed-activations"
        ...
        ...     def settings(self, facts, num_chunks):
        ...         codec = {
        ...             "class_path": "lightning_memtrain.precision.ActivationCodec",
        ...             "init_args": {"bits": 4},
        ...         }
        ...         return (TechniqueSettings("lightning_memtrain.CompressedActivations", {"codec": codec}),)
        >>> print(*CompressBy4().settings(None, 1))
        mt.CompressedActivations(codec=mt.precision.ActivationCodec(bits=4))
    """

    name = ""
    """As it is called in a table."""
    allow = ""
    """What ``allow`` must name; empty if it leaves the result as it is."""
    instead_of = ""
    """A word that alternatives share, of which one at most is switched on."""
    frees_gradients = False
    """Whether gradients are freed before the next forward anyway."""
    replaces_recomputation = False
    """Whether it saves what recomputation saves, so that it is worth trying without."""
    lowers_state = True
    """Whether it can make less of what is there when the optimizer steps: weights, gradients, its state."""
    may_be_timed = True
    """Whether chunks with it can be run for real without an update of the weights."""

    @property
    def changes(self) -> str:
        """What it changes, a phrase; empty if it leaves the result as it is."""
        return PERMISSIONS[self.allow].changes if self.allow else ""

    def is_of_use(self, facts: RunFacts) -> bool:
        """Whether there is anything to save on this device, with these optimizers.

        Args:
            facts: about the run.

        Returns:
            ``False`` for what is not worth a word.
        """
        return True

    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """Why it cannot be used, as far as that is known before it is tried.

        Args:
            facts: about the run.
            num_chunks: chunks per batch.

        Returns:
            The reason; empty if it can.
        """
        return ""

    @abstractmethod
    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """How it is given to a Trainer.

        Args:
            facts: about the run.
            num_chunks: chunks per batch.

        Returns:
            What Trainer takes.
        """

    def trainer_arguments(self, facts: RunFacts) -> Mapping[str, Any]:
        """Plain arguments of Trainer, such as ``precision``.

        Args:
            facts: about the run.

        Returns:
            The arguments by name.
        """
        return {}

    def by_hand(self, facts: RunFacts) -> tuple[str, ...]:
        """Lines that only the user can write.

        Args:
            facts: about the run.

        Returns:
            The lines; a way that has some is offered, never taken.
        """
        return ()

    def stand_ins(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """What stands in a trial for the lines that only the user can write.

        Args:
            facts: about the run.
            num_chunks: chunks per batch.

        Returns:
            What Trainer takes.
        """
        return ()


def class_names(facts: RunFacts) -> set[str]:
    """Names of the optimizers' classes and bases.

    Args:
        facts: about the run.

    Returns:
        The names.
    """
    return {name for names, _ in facts.optimizers for name in names}
