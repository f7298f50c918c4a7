"""What of a trainer decides on the memory of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.report import MemoryProfiler
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE

# They write files or to the terminal, and hold nothing on the device.
_LEFT_OUT = (Checkpoint, MemoryProfiler, ModelSummary, ProgressBar)


def trainer_options(trainer: pl.Trainer) -> dict[str, Any]:
    """Arguments for a trainer whose steps need what those of another one would on a GPU.

    Args:
        trainer: any for one device.

    Returns:
        The arguments by name.

    Raises:
        ArgumentError: if its steps are those of several devices.
    """
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ArgumentError(
            "`predict(trainer)` must train on one device, but got "
            f"{type(trainer.strategy).__name__} on {trainer.world_size} device(s), whose buckets and shards "
            "are not predicted. Pass a trainer without `strategy` and with `devices=1`; under DDP each rank "
            "needs the bytes of its gradients once more, for buckets."
        )
    callbacks = [one for one in trainer.callbacks if not isinstance(one, _LEFT_OUT)]  # type: ignore[attr-defined]
    return {
        "callbacks": callbacks,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        **_precision(trainer.precision_plugin),
    }


def _precision(plugin: Precision) -> Mapping[str, Any]:
    if type(plugin) is Precision:
        return {}
    if type(plugin) is MixedPrecision:  # it has the device's name, and a scaler for that device
        precision: Any = plugin.precision
        return {"plugins": [MixedPrecision(precision, DEVICE_TYPE)]}
    if type(plugin) is HalfPrecision:
        half: Any = plugin.precision
        return {"plugins": [HalfPrecision(half)]}
    return {"plugins": [plugin]}
