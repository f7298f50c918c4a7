"""Optimizer steps of a run, and those after which the pattern changes."""

from __future__ import annotations

from typing import Any

from lightning_memtrain.sparsity.methods.rules.layer_updates import UpdateTime
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.methods.update_schedules import UpdateSteps


class UpdateTimer:
    """Counts optimizer steps, and says when an update is due.

    An update is due after a step, and made at the end of the batch in which that step was.

    Args:
        method: that is at work.
        seed: of the run.

    Example:
        >>> from lightning_memtrain.sparsity import SET
        >>> timer = UpdateTimer(SET(0.9), seed=0)
        >>> timer.update_steps = UpdateSteps(((0, 2),), stop=10)
        >>> timer.count_step()
        >>> timer.pending, timer.next_due()
        (0, 2)
        >>> timer.count_step()
        >>> timer.pending
        2
    """

    def __init__(self, method: SparseMethod, seed: int) -> None:
        self._method = method
        self._seed = seed
        #: The steps after which the pattern changes, as soon as the length of the run is known.
        self.update_steps: UpdateSteps | None = None
        #: Optimizer steps so far.
        self.num_steps = 0
        #: The step whose update has not been made yet; 0 if there is none.
        self.pending = 0
        self._num_steps_of_batch = 1

    def count_step(self, *_: Any) -> None:
        """Count one step of the optimizer; a hook of it, whose arguments do not matter."""
        self.num_steps += 1
        self._num_steps_of_batch += 1
        if self.update_steps is not None and self.update_steps.is_due(self.num_steps):
            self.pending = self.num_steps

    def begin_batch(self) -> None:
        """Count the steps of a batch from here on."""
        self._num_steps_of_batch = 0

    def end_batch(self) -> None:
        """Expect as many steps of the next batch as there were in this one, but at least one."""
        self._num_steps_of_batch = max(1, self._num_steps_of_batch)

    def next_due(self) -> int:
        """The step of an update that the coming batch is to know the gradient for.

        Returns:
            One that is pending, or the first that is due in the coming batch; 0 if there is none.
        """
        if self.pending or self.update_steps is None:
            return self.pending
        soon = range(self.num_steps + 1, self.num_steps + 1 + self._num_steps_of_batch)
        return next((step for step in soon if self.update_steps.is_due(step)), 0)

    def time_of(self, step: int) -> UpdateTime:
        """When an update is, by the step that it comes after.

        Args:
            step: of the optimizer.

        Returns:
            The time of the method.
        """
        assert self.update_steps is not None
        return self._method.update_time(step, self.update_steps, self._seed)
