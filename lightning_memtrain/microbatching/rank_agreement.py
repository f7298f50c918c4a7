"""How ranks agree before one of them does what the others would wait for."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_memtrain.compat.lightning_packages import in_both


def is_sharded(strategy: Any) -> bool:
    """Whether parameters are sharded, so that forward and backward communicate."""
    return isinstance(strategy, (*in_both(FSDPStrategy), *in_both(ModelParallelStrategy)))


def has_synchronized_batchnorm(model: nn.Module) -> bool:
    """Whether a forward communicates because of batch normalisation."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def highest_of_ranks(trainer: Trainer, value: int) -> int:
    """The highest of a number over all ranks; every rank has to call it."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float32, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))


def raise_on_all_ranks(trainer: Trainer, refusal: Exception | None) -> None:
    """Let all ranks raise what one of them has to raise, so that no rank waits for another one.

    Args:
        trainer: the trainer that fits; every rank has to call this.
        refusal: what this rank has to raise, if it has to.

    Raises:
        MisconfigurationException: the same on all ranks, with the number of the rank that it comes from; the
            highest of several. In a single process ``refusal`` as it is.
    """
    if trainer.world_size == 1:
        if refusal is not None:
            raise refusal
        return
    refusing = highest_of_ranks(trainer, 0 if refusal is None else trainer.global_rank + 1) - 1
    if refusing >= 0:
        reason = trainer.strategy.broadcast(str(refusal), src=refusing)
        raise MisconfigurationException(f"On rank {refusing}: {reason}") from refusal
