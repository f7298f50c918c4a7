"""A technique as the planner knows it: what it asks of a run, and how it is written into a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import TechniqueSettings


class Switch(ABC):
    """A technique that is on or off, beside microbatches and recomputation.

    A subclass says when it can be used and how it is written; what it saves and whether it is exact is found
    out by running it on tensors without data, so there is no formula here.
    """

    name = ""
    """As it is called in a table."""
    allow = ""
    """What ``allow`` must name; empty if it leaves the result as it is."""
    may_be_timed = True
    """Whether chunks with it can be run for real without an update of the weights."""

    @abstractmethod
    def refusal(self, facts: RunFacts, num_chunks: int) -> str:
        """Why it cannot be used.

        Args:
            facts: about the run.
            num_chunks: chunks per batch.

        Returns:
            The reason; empty if it can.
        """

    @abstractmethod
    def settings(self, facts: RunFacts, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        """How it is given to a Trainer.

        Args:
            facts: about the run.
            num_chunks: chunks per batch.

        Returns:
            What Trainer takes.
        """


def class_names(facts: RunFacts) -> set[str]:
    """Names of the optimizers' classes and bases.

    Args:
        facts: about the run.

    Returns:
        The names.
    """
    return {name for names, _ in facts.optimizers for name in names}
