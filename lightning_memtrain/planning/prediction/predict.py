"""Predicting what a run will need on a GPU that is not there, or in this machine's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import wrong
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.microbatching.splitting.batches import batch_size_of, take_samples
from lightning_memtrain.planning.prediction.cpu.calibration import measure_call
from lightning_memtrain.planning.prediction.cpu.cpu_run import CpuConditions, run_on_cpu
from lightning_memtrain.planning.prediction.few_steps import FewSteps
from lightning_memtrain.planning.prediction.forked import call_in_asking_copy, call_in_copy
from lightning_memtrain.planning.prediction.prediction import Prediction
from lightning_memtrain.planning.prediction.ranks.world import World, world_of
from lightning_memtrain.planning.prediction.trainer_options import trainer_options
from lightning_memtrain.planning.prediction.twin.twin_run import run_on_twin
from lightning_memtrain.report import MemoryReport
from lightning_memtrain.tracing.cuda_twin import why_no_twin
from lightning_memtrain.tracing.device import Device, available_bytes
from lightning_memtrain.tracing.step.recorded_values import UnknownValueError


def predict(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    batch: Any = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    trainer: pl.Trainer | None = None,
    device: Device | str | None = None,
    world_size: int | None = None,
    strategy: str | Strategy | None = None,
) -> Prediction:
    """Predict what training will need on a device, without a GPU and without the run.

    Three training steps run in a copy of this process, on tensors that hold no data: the user's own code,
    Lightning's loop, the optimizer and every callback and plugin, as they are. Nothing of it comes back but
    the answer. What torch's CUDA allocator makes of each tensor is modelled. For a CPU, what operators hold
    only while they run is measured: those that may decide on the peak run once alone, in this process.

    Of several ranks the first one is predicted, whose shards are the largest, with a batch of its own.

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
            lists, ``"cpu"`` for this machine's memory; ``None`` for this machine's GPU, or its memory if it
            has none.
        world_size: how many ranks the run has, on however many nodes; ``None`` for the trainer's.
        strategy: ``"ddp"``, ``"fsdp2"``, or a strategy of Lightning for DDP or FSDP2; ``None`` for the
            trainer's. Under ``"fsdp2"`` a model without `configure_model` is sharded by its repeated blocks.

    Returns:
        The prediction.

    Raises:
        ArgumentError: if there are two sources of batches, or none, or ``model`` is something else, if there
            is no such device, or it is neither a CPU nor a GPU by NVIDIA, if the batch is not on the CPU, if
            the strategy is none that is predicted or lacks its number of ranks, if nothing is trained, or if
            the step asks for values that nobody knows.
    """
    if batch is not None and datamodule is not None:
        raise ArgumentError(
            "`predict(batch, datamodule)` takes one of the two, but got both. Pass a batch as a data loader "
            "yields it, or the data module that the run will use."
        )
    if datamodule is not None and not hasattr(datamodule, "train_dataloader"):
        raise wrong("predict", "datamodule", "a LightningDataModule", datamodule, "Leave it out for `batch`.")
    if trainer is not None and not hasattr(trainer, "strategy"):
        raise wrong("predict", "trainer", "a Trainer", trainer, "Leave it out for Lightning's defaults.")
    if device is not None and not isinstance(device, (str, Device)):
        raise wrong("predict", "device", "a Device or its name", device, "Write e.g. 'RTX 4090'.")
    if not callable(model):  # a LightningModule is callable, too
        raise ArgumentError(
            "`predict(model)` must be a LightningModule or a function that makes one, but got "
            f"{type(model).__name__}. Put it into a LightningModule with its training_step and optimizer."
        )
    if batch is None and datamodule is None and not _brings_data(model):
        raise ArgumentError(
            "`predict(batch, datamodule)` needs one of the two for a model without `train_dataloader`, but "
            "got neither. Pass a batch as a data loader yields it, or the data module that the run will use."
        )
    found = _known(device)
    _refuse_elsewhere(batch)
    world = world_of(trainer, world_size, strategy)
    missing = why_no_twin() if found.is_cuda else ""
    if world is not None and (missing or not found.is_cuda):
        raise ArgumentError(
            f"`predict(device)` must be a GPU for a run of {world.size} ranks, but got {found.name!r}"
            + (f", and {missing}." if missing else ". Name one that `memtrain devices` lists.")
        )
    on_twin = found.is_cuda and not missing
    options = trainer_options(trainer, world, **({} if on_twin else {"device_type": "cpu"}))

    def run(make_data: Callable[[], Any]) -> FewSteps:
        try:
            if on_twin:
                return call_in_copy(lambda: run_on_twin(model, make_data(), options, found, world))
            conditions = CpuConditions.now(model, batch)
            return call_in_asking_copy(
                lambda ask: run_on_cpu(model, make_data(), options, ask, conditions), measure_call
            )
        except UnknownValueError as error:
            raise ArgumentError(
                f"`predict(model)` needs a step that goes the same way whatever the weights are, but "
                f"{error}. Leave that question out of training (log tensors instead of `.item()`, choose "
                "with `torch.where` instead of `if`), or see what a real step needs with `MemoryProfiler`."
            ) from error

    notes = (f"{NOT_KNOWN}, since {missing}",) if missing else ()

    def of_size(size: int) -> Prediction:
        return _prediction(found, run(lambda: Repeated(take_samples(batch, size))), size, world, notes)

    if batch is None:
        return _prediction(found, run(lambda: datamodule), None, world, notes)
    size = _batch_size(batch)
    return replace(_prediction(found, run(lambda: Repeated(batch)), size, world, notes), _of_size=of_size)


#: What a prediction for a GPU does not know where there can be no twin of it.
NOT_KNOWN = (
    "Counted on CPU tensors without data: not known are what the GPU's kernels hold (masks of dropout, "
    "scores of attention), autocast by CUDA's lists, workspaces of its libraries, and what torch's allocator "
    "makes of it: what is reserved is what tensors and the CPU's operators hold"
)


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


def _prediction(
    device: Device,
    found: FewSteps,
    batch_size: int | None,
    world: World | None,
    notes: tuple[str, ...],
) -> Prediction:
    return Prediction(
        device=device,
        report=_named(found.report, device, world),
        allocated_bytes=found.allocated_bytes,
        reserved_bytes=found.reserved_bytes,
        context_bytes=found.process_bytes if device.is_cpu else device.context_bytes,
        workspace_bytes=found.workspace_bytes,
        batch_size=batch_size,
        world_size=1 if world is None else world.size,
        strategy=None if world is None else world.name,
        unknown=tuple(f"{what} at {site}" for site, what in found.guessed.items()),
        unmeasured=tuple(f"{operator}: {reason}" for operator, reason in found.unmeasured.items()),
        available_bytes=available_bytes() if device == Device.named("cpu") else None,
        notes=(*notes, *_of_compiled(found.compiled), *found.left_out),
        convolution_bound_bytes=found.convolution_bytes,
    )


def _of_compiled(module: str) -> tuple[str, ...]:
    if not module:
        return ()
    return (
        f"{module} is compiled, but was run operator by operator: what compiled kernels need is not known, "
        "which is mostly less",
    )


def _named(report: MemoryReport, device: Device, world: World | None) -> MemoryReport:
    """The report with the device's own name, not with that of its twin."""
    rank = "" if world is None else f", 1 of {world.size} by {world.name}"
    name = f"{device.name} (predicted{rank})"
    stages = {stage: replace(breakdown, device=name) for stage, breakdown in report.stages.items()}
    return replace(report, stages=stages, environment={**report.environment, "device": name})


def _known(device: Device | str | None) -> Device:
    found = Device.named(device) if isinstance(device, str) else device or Device.here()
    if not (found.is_cuda or found.is_cpu):
        raise ArgumentError(
            f"`predict(device)` must be a GPU by NVIDIA or a CPU, but got {found.name!r}. Name one that "
            '`memtrain devices` lists, such as device="RTX 4090", describe it by `Device(name, total_bytes, '
            'compute_capability=...)`, or have "cpu" in the name of `Device(name, total_bytes)`.'
        )
    return found


def _refuse_elsewhere(batch: Any) -> None:
    for tensor in find_tensors(batch):
        if tensor.device.type != "cpu":
            raise ArgumentError(
                f"`predict(batch)` must be on the CPU, as a data loader yields it, but has a tensor on "
                f"{tensor.device}. Pass the batch before it is moved."
            )


def _batch_size(batch: Any) -> int | None:
    try:
        return batch_size_of(batch)
    except MisconfigurationException:  # only `largest_batch_size` needs it, and says so
        return None
