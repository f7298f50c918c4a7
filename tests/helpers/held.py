"""Callbacks that come to hold something beside the steps of a run."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Callback
from torch import nn


class Average(Callback):
    """A copy of a part of the model, made after so many steps, as an average of weights begins with one.

    Args:
        part: name of the submodule.
        after: optimizer steps.
    """

    def __init__(self, part: str, after: int) -> None:
        self.part, self.after = part, after
        self.kept: nn.Module | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Make it."""
        if trainer.global_step == self.after:
            self.kept = copy.deepcopy(getattr(pl_module, self.part))
