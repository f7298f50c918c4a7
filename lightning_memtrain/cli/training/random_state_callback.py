"""The state of the random number generators, saved with every checkpoint."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_memtrain.core.random_state import load_random_state_dict, random_state_dict


class RandomState(Callback):
    """Lets a resumed run draw the numbers, e.g. for dropout, that the uninterrupted one would have drawn.

    Saves Python's generator, NumPy's and torch's, on the CPU and on the process's CUDA device, of every
    process.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state of every process; Lightning calls this in all of them at once."""
        mine = random_state_dict()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"processes": [mine]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, mine)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: setting it up draws numbers, too."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that starts now draws from here, its loaders' seeds included."""
        self._restore(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """An epoch that goes on drew its loaders' seeds when it began, and not again."""
        if batch_idx > 0:
            self._restore(trainer)
        self._restored = None

    def _restore(self, trainer: pl.Trainer) -> None:
        # On another number of processes no state fits all; they go on with what they were seeded with.
        if self._restored is not None and len(self._restored["processes"]) == trainer.world_size:
            load_random_state_dict(self._restored["processes"][trainer.global_rank])
