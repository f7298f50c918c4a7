"""What stands in a trial for a line that only the user can write; the trial is a process of its own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_memtrain.precision import SGD8bit, adam8bit, adamw8bit

_KEPT = {
    SGD8bit: ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    adam8bit: ("lr", "betas", "eps"),
    adamw8bit: ("lr", "betas", "eps", "weight_decay"),
}


class StateIn8BitsStandIn(pl.Callback):
    """Puts optimizers with state in 8 bits into the place of the user's."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The user's are there by now, and have no state."""
        own = trainer.strategy.optimizers
        made = [in_8_bits(one) for one in own]
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            for before, after in zip(own, made, strict=True):
                if scheduler.optimizer is before:
                    scheduler.optimizer = after
        trainer.strategy.optimizers = made


class LoopStepStandIn(pl.Callback):
    """Has every optimizer step one parameter after the other."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Torch asks for the argument in each step."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.update({key: False for key in ("foreach", "fused") if key in group})


def in_8_bits(optimizer: Optimizer) -> Optimizer:
    """The same optimizer with its state in 8 bits.

    Args:
        optimizer: SGD, Adam or AdamW by torch; others are returned as they are.

    Returns:
        The other one.
    """
    kinds: tuple[tuple[type[Optimizer], Any], ...] = (
        (AdamW, adamw8bit),
        (Adam, adam8bit),
        (SGD, SGD8bit),
    )
    make = next((make for kind, make in kinds if isinstance(optimizer, kind)), None)
    if make is None:
        return optimizer
    groups = [
        {key: value for key, value in group.items() if key in ("params", *_KEPT[make])}
        for group in optimizer.param_groups
    ]
    first = {key: value for key, value in groups[0].items() if key != "params"}
    made: Optimizer = make(groups, **first)
    return made
