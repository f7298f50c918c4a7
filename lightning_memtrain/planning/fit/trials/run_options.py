"""What of a run decides on its steps: arguments of its Trainer, and a batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_memtrain.compat.lightning_packages import in_both, namesake
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.planning.prediction.few_steps import Model, is_module, made_module
from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.planning.prediction.ranks.world import World, world_of
from lightning_memtrain.planning.prediction.trainer_options import trainer_options
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE
from lightning_memtrain.tracing.device import Device


def sharded_world(trainer: Any) -> World | None:
    """The ranks of a run under FSDP2, each of which has a part of the model.

    Args:
        trainer: of the run.

    Returns:
        The ranks; ``None`` where each has the whole model.
    """
    if trainer is None or not isinstance(trainer.strategy, in_both(ModelParallelStrategy)):
        return None
    return world_of(trainer, None, None)


def run_options(trainer: pl.Trainer | None, device: Device, world: World | None = None) -> dict[str, Any]:
    """Arguments for a Trainer whose steps are those of the run, but for callbacks that plan.

    Args:
        trainer: of the run; ``None`` for Lightning's defaults.
        device: what the run uses.
        world: the ranks of a run under FSDP2.

    Returns:
        The arguments by name.

    Raises:
        ArgumentError: if the run uses several devices.
    """
    if trainer is None:
        return {}
    options = trainer_options(trainer, world, device_type=DEVICE_TYPE if device.is_cuda else "cpu")
    options["callbacks"] = [
        one for one in options["callbacks"] if not getattr(type(one), "plans_memory", False)
    ]
    return {name: value for name, value in options.items() if value is not None}


class _Enough(Exception):
    """Ends a run once its batches are known."""


class _FirstBatches(pl.Callback):
    def __init__(self, num_batches: int) -> None:
        self.batches: list[Any] = []
        self._num_batches = num_batches

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> Any:
        self.batches.append(batch)
        if len(self.batches) >= self._num_batches:
            raise _Enough
        return -1  # nothing is trained


def first_batches(
    model: Model,
    datamodule: pl.LightningDataModule | None,
    options: Mapping[str, Any],
    num_batches: int = 3,
    is_sharded: bool = False,
) -> list[Any]:
    """The first batches of a run, on the CPU, from a copy of this process.

    Args:
        model: what is trained, or what makes it.
        datamodule: where batches come from; ``None`` for the model's own loader.
        options: arguments of Trainer.
        num_batches: most batches to look at.
        is_sharded: whether the model shards itself.

    Returns:
        At least one.

    Raises:
        ArgumentError: if there is none.
    """

    def gather() -> list[Any]:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        module = model if is_module(model) else made_module(model)
        if is_sharded:  # which nobody can here, and for batches nobody has to
            module.configure_model = lambda: None  # type: ignore[method-assign]
            module.configure_optimizers = lambda: None  # type: ignore[method-assign]
        gatherer = _FirstBatches(num_batches)
        kept = {key: value for key, value in options.items() if key == "accumulate_grad_batches"}
        trainer = namesake(pl.Trainer, module)(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=num_batches,
            limit_val_batches=0,
            logger=False,
            callbacks=[gatherer],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **kept,
        )
        with suppress(_Enough):
            trainer.fit(module, datamodule=datamodule)
        return gatherer.batches

    batches = call_in_copy(gather)
    if not batches:
        raise ArgumentError(
            "`plan(datamodule)` must yield a batch, but the loader of the run is empty. Pass one batch as "
            "the loader would yield it."
        )
    return batches
