"""A run on several devices as that of one of them, which is what is predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_memtrain.compat.lightning_packages import in_both
from lightning_memtrain.core import format_bytes
from lightning_memtrain.microbatching.training_loop import gradients_are_bucket_views
from lightning_memtrain.planning.fit.way import FoundWays


class OneRank:
    """What a trainer under `ddp` is for one of its ranks.

    Args:
        trainer: the trainer that fits.
    """

    world_size = 1

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.strategy = SingleDeviceStrategy(trainer.strategy.root_device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def one_rank(trainer: pl.Trainer) -> Any:
    """What is to be predicted of a trainer.

    Args:
        trainer: the trainer that fits.

    Returns:
        One rank of it under `ddp`, where each holds the whole model; else the trainer itself.
    """
    return OneRank(trainer) if isinstance(trainer.strategy, in_both(DDPStrategy)) else trainer


def bucket_bytes(trainer: pl.Trainer, model: nn.Module) -> int:
    """What `ddp` holds besides what one rank would: buckets that gradients are averaged in.

    Args:
        trainer: the trainer that fits.
        model: its module.

    Returns:
        The bytes of all gradients, unless these lie in the buckets.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, in_both(DDPStrategy)) or gradients_are_bucket_views(strategy):
        return 0
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def beside_buckets(found: FoundWays, buckets: int) -> FoundWays:
    """Say that a part of the limit was left to buckets.

    Args:
        found: what the search came to within the rest.
        buckets: bytes of the buckets.

    Returns:
        The same, with a note if there are buckets.
    """
    if not buckets:
        return found
    note = f"{format_bytes(buckets)} of the limit are left to the buckets of ddp."
    return replace(found, notes=(*found.notes, note), predict_way=None)
