"""How far a run has come, so that a trial of it is of its present phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl


@dataclass(frozen=True)
class RunProgress:
    """Epoch and steps of a run.

    Args:
        epoch: that has begun.
        automatic_steps: of optimizers that Lightning steps.
        manual_steps: of optimizers that the module steps.
    """

    epoch: int = 0
    automatic_steps: int = 0
    manual_steps: int = 0

    @classmethod
    def of(cls, trainer: Any) -> RunProgress:
        """That of a trainer.

        Args:
            trainer: any; ``None`` for a run that has not begun.

        Returns:
            Its progress.
        """
        if trainer is None:
            return cls()
        loop = trainer.fit_loop.epoch_loop
        return cls(
            trainer.current_epoch,
            loop.automatic_optimization.optim_progress.optimizer.step.total.completed,
            loop.manual_optimization.optim_step_progress.total.completed,
        )

    def give_to(self, trainer: pl.Trainer) -> None:
        """Let a trainer begin where the run is; it still takes as many steps as it was made for.

        Args:
            trainer: has not begun.
        """
        fit_loop = trainer.fit_loop
        loop: Any = fit_loop.epoch_loop
        for name in ("ready", "started", "processed", "completed"):
            setattr(fit_loop.epoch_progress.current, name, self.epoch)
        if fit_loop.max_epochs is not None and fit_loop.max_epochs >= 0:
            fit_loop.max_epochs += self.epoch
        step = loop.automatic_optimization.optim_progress.optimizer.step.total
        step.ready = step.completed = self.automatic_steps
        step = loop.manual_optimization.optim_step_progress.total
        step.ready = step.completed = self.manual_steps
        if loop.max_steps is not None and loop.max_steps >= 0:
            loop.max_steps += self.automatic_steps
