"""Predicting what a run will need on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.microbatching.splitting.batches import batch_size_of, take_samples
from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.planning.prediction.prediction import Prediction
from lightning_memtrain.planning.prediction.trainer_options import trainer_options
from lightning_memtrain.planning.prediction.twin.twin_run import TwinRun, run_on_twin
from lightning_memtrain.planning.prediction.without_twin import NOT_KNOWN, run_without_twin
from lightning_memtrain.report import MemoryReport
from lightning_memtrain.tracing.cuda_twin import why_no_twin
from lightning_memtrain.tracing.device import Device
from lightning_memtrain.tracing.step.recorded_values import UnknownValueError


def predict(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    batch: Any = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    trainer: pl.Trainer | None = None,
    device: Device | str | None = None,
) -> Prediction:
    """Predict what training will need on a GPU, without the GPU and without the run.

    Three training steps run in a copy of this process, on tensors that hold no data: the user's own code,
    Lightning's loop, the optimizer and every callback and plugin, as they are. Nothing of it comes back but
    the answer. What torch's CUDA allocator makes of each tensor is modelled.

    Validation is left out. So is what NCCL and kernels of other libraries allocate for themselves; of cuDNN
    there is a bound. Where torch is too old for that (2.13 is not), or has another third-party device in this
    process, one step is counted on CPU tensors without data, and :attr:`.Prediction.notes` say what is
    then not known.

    Args:
        model: the module to train; or a function that makes it, which then needs no memory for its weights.
        batch: one batch on the CPU, as a data loader yields it; ``None`` for the first ones of ``datamodule``
            or of the model's own ``train_dataloader``.
        datamodule: where batches come from.
        trainer: as the run will have it: precision, accumulated batches, clipping, callbacks and plugins are
            taken over. ``None`` for Lightning's defaults.
        device: a :class:`~lightning_memtrain.planning.Device` or the name of one that ``memtrain devices``
            lists, ``None`` for the GPU of this machine.

    Returns:
        The prediction.

    Raises:
        TypeError: if there are two sources of batches, or none, or ``model`` is something else.
        ValueError: if there is no such device, or it is no GPU by NVIDIA, if the batch is not on the CPU, if
            the trainer uses several devices, or if the step asks for values that nobody knows.
    """
    if batch is not None and datamodule is not None:
        raise TypeError(
            "`predict(batch, datamodule)` takes one of the two, but got both. Pass a batch as a data loader "
            "yields it, or the data module that the run will use."
        )
    if not callable(model):  # a LightningModule is callable, too
        raise TypeError(
            "`predict(model)` must be a LightningModule or a function that makes one, but got "
            f"{type(model).__name__}. Put it into a LightningModule with its training_step and optimizer."
        )
    if batch is None and datamodule is None and not _brings_data(model):
        raise TypeError(
            "`predict(batch, datamodule)` needs one of the two for a model without `train_dataloader`, but "
            "got neither. Pass a batch as a data loader yields it, or the data module that the run will use."
        )
    gpu = _gpu(device)
    _refuse_elsewhere(batch)
    missing = why_no_twin()
    options = trainer_options(trainer) if trainer is not None else {}

    def run(make_data: Callable[[], Any]) -> TwinRun:
        try:
            if missing:
                return call_in_copy(lambda: run_without_twin(model, make_data()))
            return call_in_copy(lambda: run_on_twin(model, make_data(), options, gpu))
        except UnknownValueError as error:
            raise ValueError(
                f"`predict(model)` needs a step that goes the same way whatever the weights are, but "
                f"{error}. Leave that question out of training (log tensors instead of `.item()`, choose "
                "with `torch.where` instead of `if`), or see what a real step needs with `MemoryProfiler`."
            ) from error

    notes = (f"{NOT_KNOWN}, since {missing}",) if missing else ()

    def of_size(size: int) -> Prediction:
        return _prediction(gpu, run(lambda: Repeated(take_samples(batch, size))), size, notes)

    if batch is None:
        return _prediction(gpu, run(lambda: datamodule), None, notes)
    size = _batch_size(batch)
    return replace(_prediction(gpu, run(lambda: Repeated(batch)), size, notes), _of_size=of_size)


class Repeated:
    """A loader that yields the same batch again and again.

    Args:
        batch: what it yields.
    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._batch


def _brings_data(model: Any) -> bool:
    kind = model if isinstance(model, type) else type(model)
    own = getattr(kind, "train_dataloader", None)
    return own is not None and own is not pl.LightningModule.train_dataloader


def _prediction(device: Device, found: TwinRun, batch_size: int | None, notes: tuple[str, ...]) -> Prediction:
    return Prediction(
        device=device,
        report=_named(found.report, device),
        allocated_bytes=found.allocated_bytes,
        reserved_bytes=found.reserved_bytes,
        context_bytes=device.context_bytes,
        workspace_bytes=found.workspace_bytes,
        batch_size=batch_size,
        unknown=tuple(f"{what} at {site}" for site, what in found.guessed.items()),
        notes=(*notes, *_of_compiled(found.compiled)),
        convolution_bound_bytes=found.convolution_bytes,
    )


def _of_compiled(module: str) -> tuple[str, ...]:
    if not module:
        return ()
    return (
        f"{module} is compiled, but was run operator by operator: what compiled kernels need is not known, "
        "which is mostly less",
    )


def _named(report: MemoryReport, device: Device) -> MemoryReport:
    """The report with the device's own name, not with that of its twin."""
    name = f"{device.name} (predicted)"
    stages = {stage: replace(breakdown, device=name) for stage, breakdown in report.stages.items()}
    return replace(report, stages=stages, environment={**report.environment, "device": name})


def _gpu(device: Device | str | None) -> Device:
    found = Device.named(device) if isinstance(device, str) else device or Device.here()
    if not found.is_cuda:
        given = "this machine, which has no GPU by NVIDIA" if device is None else f"{found.name!r}"
        raise ValueError(
            f"`predict(device)` must be a GPU by NVIDIA, but got {given}. Name one that `memtrain devices` "
            'lists, such as device="RTX 4090", or describe it by `Device(name, total_bytes, '
            "compute_capability=...)`. For the CPU, profile a step with `MemoryProfiler`: its kernels and "
            "its allocator are others, which a prediction does not know."
        )
    return found


def _refuse_elsewhere(batch: Any) -> None:
    for tensor in find_tensors(batch):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"`predict(batch)` must be on the CPU, as a data loader yields it, but has a tensor on "
                f"{tensor.device}. Pass the batch before it is moved."
            )


def _batch_size(batch: Any) -> int | None:
    try:
        return batch_size_of(batch)
    except MisconfigurationException:  # only `largest_batch_size` needs it, and says so
        return None
