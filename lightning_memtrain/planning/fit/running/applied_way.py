"""The techniques of a way put into a run that has begun, and taken out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.rank_agreement import has_synchronized_batchnorm, is_sharded
from lightning_memtrain.microbatching.training_loop import uses_static_graph
from lightning_memtrain.planning.fit.objects import class_of, made
from lightning_memtrain.planning.fit.way import TechniqueSettings, Way


class AppliedWay:
    """Callbacks that a run was given after it had begun.

    Args:
        way: what to apply.
        trainer: the trainer that fits.
        model: its module.

    Raises:
        MisconfigurationException: if the trainer has one of the techniques already.
    """

    def __init__(self, way: Way, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.way = way
        refuse_callbacks_of_both(way, trainer)
        recovers = can_recover(trainer, model)
        self.callbacks: list[pl.Callback] = [made(_recovering(one, recovers)) for one in way.techniques]

    @property
    def microbatching(self) -> Microbatching | None:
        """What splits the batch, if anything does."""
        return next((one for one in self.callbacks if isinstance(one, Microbatching)), None)

    def begin(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        after: pl.Callback,
        states: Mapping[str, Any],
        in_training: bool,
    ) -> None:
        """Put the callbacks into the trainer's list, and call those of their hooks that are over by now.

        Lightning walks along the list itself, so that what is put behind the callback whose hook runs is
        called for the same hook, too.

        Args:
            trainer: the trainer that fits.
            model: its module.
            after: the callback whose hook runs, first in the list.
            states: what a checkpoint has of callbacks, by key.
            in_training: whether the first batch is at hand; else fit is about to start.
        """
        listed: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        place = listed.index(after) + 1
        listed[place:place] = self.callbacks
        for callback in self.callbacks:
            callback.setup(trainer, model, "fit")
        for callback in self.callbacks:
            if callback.state_key in states:
                callback.load_state_dict(dict(states[callback.state_key]))
        for hook in ("on_fit_start", "on_train_start", "on_train_epoch_start") if in_training else ():
            for callback in self.callbacks:
                getattr(callback, hook)(trainer, model)

    def end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Take the callbacks out again, and let them leave the model as they found it.

        Args:
            trainer: the trainer that fits.
            model: its module.
        """
        for callback in reversed(self.callbacks):
            callback.teardown(trainer, model, "fit")
        self.leave(trainer)

    def leave(self, trainer: pl.Trainer) -> None:
        """Take the callbacks out of the trainer's list.

        Args:
            trainer: the trainer.
        """
        listed: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        listed[:] = [one for one in listed if not any(one is mine for mine in self.callbacks)]


def refuse_callbacks_of_both(way: Way, trainer: pl.Trainer) -> None:
    """Refuse a way whose technique is among the trainer's own callbacks.

    Args:
        way: what is to be applied.
        trainer: the trainer that fits.

    Raises:
        MisconfigurationException: if there would be two of one technique.
    """
    own: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for one in way.techniques:
        kind = class_of(one.class_path)
        if any(isinstance(callback, kind) for callback in own):
            raise MisconfigurationException(
                f"`FitMemory` is about to use {one}, but the Trainer has {one.name} already. Take yours out "
                f"of `callbacks`, or change the plan: plan.edit({one.name}=None)."
            )


def can_recover(trainer: pl.Trainer, model: nn.Module) -> bool:
    """Whether a batch can be run again when memory runs out: no rank may wait for another one meanwhile.

    Args:
        trainer: the trainer that fits.
        model: its module.

    Returns:
        ``False`` where forward or each backward communicates.
    """
    if trainer.world_size == 1:
        return True
    strategy = trainer.strategy
    return not (is_sharded(strategy) or uses_static_graph(strategy) or has_synchronized_batchnorm(model))


def _recovering(settings: TechniqueSettings, recovers: bool) -> TechniqueSettings:
    arguments = settings.init_args
    is_fixed = settings.name == "Microbatching" and isinstance(arguments.get("microbatch_size"), int)
    if not (recovers and is_fixed) or arguments.get("batchnorm") == "synchronized":
        return settings
    return TechniqueSettings(settings.class_path, {"recover": True, **arguments}, settings.place)
