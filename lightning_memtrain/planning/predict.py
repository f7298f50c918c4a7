"""Predicting what a run will need on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision

from lightning_memtrain.planning.forked import call_in_copy
from lightning_memtrain.planning.prediction import Prediction
from lightning_memtrain.planning.twin_run import run_on_twin
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE
from lightning_memtrain.tracing.device import Device


def predict(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    batch: Any = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    trainer: pl.Trainer | None = None,
    device: Device | str | None = None,
) -> Prediction:
    """Predict what training will need on a device, without the device and without the run.

    Three training steps run in a copy of this process, on tensors of the device that hold no data: the user's
    own code, Lightning's loop, the optimizer and every callback and plugin, as they are. Nothing of it comes
    back but the answer. What torch's allocator makes of each tensor is modelled, see
    :mod:`lightning_memtrain.tracing.allocator`.

    Args:
        model: the module to train; or a function that makes it, which then needs no memory for its weights.
        batch: one batch on the CPU, as a data loader yields it.
        datamodule: where batches come from, in place of ``batch``.
        trainer: as the run will have it: precision, accumulated batches, clipping, callbacks and plugins are
            taken over. ``None`` for Lightning's defaults.
        device: a :class:`~lightning_memtrain.planning.Device` or the name of one that ``memtrain devices``
            lists, ``None`` for that of this machine.

    Returns:
        The prediction.

    Raises:
        TypeError: if ``batch`` and ``datamodule`` are both given, or none.
        ValueError: if ``device`` is the name of none.
    """
    if (batch is None) == (datamodule is None):
        got = "none" if batch is None else "both"
        raise TypeError(
            f"`predict(batch, datamodule)` needs one of the two, but got {got}. Pass a batch as a data loader "
            "yields it, or the data module that the run will use."
        )
    if isinstance(device, str):
        device = Device.named(device)
    elif device is None:
        device = Device.here()
    options = trainer_options(trainer) if trainer is not None else {}
    data = datamodule if batch is None else Repeated(batch)
    workspaces = {"cuBLAS": device.cublas_workspace_bytes, "cuBLASLt": device.cublaslt_workspace_bytes}
    found = call_in_copy(lambda: run_on_twin(model, data, options, workspaces))
    return Prediction(
        device=device,
        report=found.report,
        allocated_bytes=found.allocated_bytes,
        reserved_bytes=found.reserved_bytes,
        context_bytes=device.context_bytes,
        workspace_bytes=found.workspace_bytes,
        unknown=tuple(f"{what} at {site}" for site, what in found.guessed.items()),
    )


class Repeated:
    """A loader that yields the same batch again and again.

    Args:
        batch: what it yields.
        num_batches: how often.
    """

    def __init__(self, batch: Any, num_batches: int = 1000) -> None:
        self._batch = batch
        self._num_batches = num_batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._num_batches):
            yield self._batch

    def __len__(self) -> int:
        return self._num_batches


def trainer_options(trainer: pl.Trainer) -> dict[str, Any]:
    """What of a trainer decides on the memory of its steps, as arguments of another one.

    Args:
        trainer: any.

    Returns:
        The arguments by name.
    """
    callbacks = [one for one in trainer.callbacks if not isinstance(one, (Checkpoint, ProgressBar))]
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
    if type(plugin) is MixedPrecision:
        return {"plugins": [MixedPrecision(plugin.precision, DEVICE_TYPE)]}
    if type(plugin) is HalfPrecision:
        return {"plugins": [HalfPrecision(plugin.precision)]}
    return {"plugins": [plugin]}
