"""Which steps the ledger watches."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from lightning_memtrain.core import ArgumentError

# The first step creates the optimizer state, the second is the first to run with it, and the third shows
# whether the second was typical.
NUM_FIRST_STEPS = 3


@dataclass(frozen=True)
class LedgerSchedule:
    """The first three steps of a stage, then every N-th.

    Args:
        every_n_steps: steps from one watched step to the next, at least 1.

    Raises:
        ArgumentError: if ``every_n_steps`` is no whole number from 1 on.

    Example:
        >>> schedule = LedgerSchedule(every_n_steps=50)
        >>> [step for step in range(120) if schedule.watches(step)]
        [0, 1, 2, 50, 100]
    """

    every_n_steps: int

    def __post_init__(self) -> None:
        given = self.every_n_steps
        refusal = (
            "`MemoryProfiler(every_n_steps)` must be an integer of at least 1, "
            f"but got every_n_steps={given!r}. "
            "Use 1 to let the ledger watch every step, or a larger number to let it watch fewer."
        )
        if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
            raise ArgumentError(refusal)

    def watches(self, step: int) -> bool:
        """Whether the ledger watches a step.

        Args:
            step: number of the step in its stage, from 0.

        Returns:
            ``True`` for the first steps and every N-th.
        """
        return step < NUM_FIRST_STEPS or step % self.every_n_steps == 0
