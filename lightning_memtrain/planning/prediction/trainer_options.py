"""What of a trainer decides on the memory of its steps."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision

from lightning_memtrain.compat.lightning_packages import in_both, namesake
from lightning_memtrain.compat.lightning_private import layer_sync
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.planning.prediction.ranks.world import World
from lightning_memtrain.report import MemoryProfiler
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE

# They write files or to the terminal, and hold nothing on the device.
_LEFT_OUT = (Checkpoint, ModelSummary, ProgressBar)


def trainer_options(
    trainer: pl.Trainer | None, world: World | None = None, device_type: str = DEVICE_TYPE
) -> dict[str, Any]:
    """Arguments for a trainer whose steps need what those of another one would on a device.

    Args:
        trainer: as the run will have it; ``None`` for Lightning's defaults.
        world: the ranks of the run; ``None`` for one device.
        device_type: what torch calls the device.

    Returns:
        The arguments by name.

    Raises:
        ArgumentError: if layers are to compute over all ranks.
    """
    own: Precision = Precision() if world is None else world.strategy.precision_plugin
    if trainer is None:
        return {"plugins": _precision(own, device_type)}
    plugin = trainer.precision_plugin
    left_out: tuple[type, ...] = (MemoryProfiler, *(found for kind in _LEFT_OUT for found in in_both(kind)))
    callbacks = [one for one in trainer.callbacks if not isinstance(one, left_out)]  # type: ignore[attr-defined]
    if world is not None and layer_sync(trainer.strategy) is not None:
        raise ArgumentError(
            "`predict(trainer)` must leave batch normalisation to each rank, but got sync_batchnorm=True, "
            "whose kernels are not known without data. Predict with sync_batchnorm=False: its layers keep "
            "the same inputs for backward."
        )
    return {
        "callbacks": callbacks,
        "plugins": _precision(own if type(plugin) in in_both(Precision) else plugin, device_type),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
    }


def _precision(plugin: Precision, device_type: str) -> list[Any]:
    if type(plugin) in in_both(Precision):
        return []
    if type(plugin) in in_both(MixedPrecision):  # it has the device's name, and a scaler for that device
        precision: Any = plugin.precision
        return [namesake(MixedPrecision, plugin)(precision, device_type)]
    if type(plugin) in in_both(HalfPrecision):
        half: Any = plugin.precision
        return [namesake(HalfPrecision, plugin)(half)]
    return [plugin]
