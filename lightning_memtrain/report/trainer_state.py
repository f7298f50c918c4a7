"""What the profiler has to know of the model and of Lightning's insides, in one place."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memtrain.compat.torch_private import storage_key
from lightning_memtrain.core import ReportWarning, TechniqueRecord, is_technique
from lightning_memtrain.ledger import parameter_devices
from lightning_memtrain.ledger.tensors.storages import storages_of
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.report.memory_report import METRIC_PREFIX
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors


def profiled_device(model: torch.nn.Module) -> torch.device:
    """The device on which all parameters of a model are.

    Args:
        model: the module to profile.

    Returns:
        The device, with its index.

    Raises:
        ValueError: if there are no parameters, or parameters on two devices.
    """
    devices = parameter_devices(model)
    kind = type(model).__name__
    if not devices:
        raise ValueError(
            f"`MemoryProfiler` needs a model with parameters, which decide on the device to profile, "
            f"but got {kind} with none. Make its layers in `__init__` or `configure_model`, "
            f"or train it without the profiler."
        )
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(
            f"`MemoryProfiler` needs all parameters on one device, whose bytes it counts, "
            f"but {kind} has {found}. Let the trainer move the whole model to one device, "
            f"or train it without the profiler."
        )
    return next(iter(devices))


def held_beside(search: HeldTensors, trainer: Trainer, model: LightningModule) -> list[Tensor]:
    """Tensors that live on beside a step, without the numbers that the profiler itself has logged.

    Args:
        search: finds them; the same one in each step, since it learns which classes to look into.
        trainer: the trainer.
        model: its module.

    Returns:
        Tensors of any kind and device; training state may be among them.
    """
    logged = {id(value) for name, value in trainer.callback_metrics.items() if name.startswith(METRIC_PREFIX)}
    return [one for one in search.beside_steps(trainer, model) if id(one) not in logged]


def stage_name(trainer: Trainer) -> str:
    """What the trainer was called to do: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""
    fn = trainer.state.fn
    return "fit" if fn is None else str(fn.value)


def evaluation_name(trainer: Trainer) -> str:
    """Which evaluation is going on, maybe inside of a fit: ``"validate"``, ``"test"`` or ``"predict"``."""
    return "predict" if trainer.predicting else "test" if trainer.testing else "validate"


def uses_torch_profiler(trainer: Trainer) -> bool:
    """Whether the trainer profiles with torch's own profiler, which it may start at any time."""
    # By name, so that a `pytorch_lightning` Trainer's is recognised, too.
    return any(cls.__name__ == "PyTorchProfiler" for cls in type(getattr(trainer, "profiler", None)).__mro__)


def technique_records(trainer: Trainer) -> tuple[TechniqueRecord, ...]:
    """What the run's techniques say of themselves; one that cannot is left out with a warning.

    Args:
        trainer: the trainer whose callbacks, strategy and precision plugin are asked.

    Returns:
        One record per technique, in that order.
    """
    asked = (*trainer.callbacks, trainer.strategy, trainer.precision_plugin)  # type: ignore[attr-defined]
    techniques = {id(candidate): candidate for candidate in asked if is_technique(candidate)}
    records: list[TechniqueRecord] = []
    for technique in techniques.values():
        try:
            record = technique.technique_record()
            if not isinstance(record, TechniqueRecord):
                raise TypeError(f"expected a TechniqueRecord, but got {record!r}")
            records.append(record)
        except Exception as error:  # neither the run nor its report may end by this
            warnings.warn(
                f"`MemoryProfiler` could not ask {type(technique).__name__} for its `technique_record()`, "
                f"so the report does without: {type(error).__name__}: {error}",
                ReportWarning,
                stacklevel=2,
            )
    return tuple(records)


def kept_storages(trainer: Trainer, pl_module: LightningModule) -> set[int]:
    """Storages that outlive steps by design and have a fixed size.

    Args:
        trainer: the running trainer, with its logged values, its batch (that of the step before, if steps
            fetch their own) and the scale of the loss.
        pl_module: the model, with its metrics.

    Returns:
        The ``_cdata`` of each storage.
    """
    values = (value for value in _kept_values(trainer, pl_module) if isinstance(value, torch.Tensor))
    tensors = itertools.chain(values, find_tensors(getattr(trainer._results, "batch", None)))
    return {storage_key(storage) for tensor in tensors for storage in storages_of(tensor)}


def _kept_values(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    yield from trainer.callback_metrics.values()
    yield from trainer.logged_metrics.values()
    yield from trainer.progress_bar_metrics.values()
    # Every logged value is a metric, too.
    for metric in (*(trainer._results or {}).values(), *pl_module.modules()):
        if isinstance(metric, torchmetrics.Metric):
            yield from vars(metric).values()
            yield from metric._defaults.values()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        yield from vars(scaler).values()


def compare_ranks(trainer: Trainer, peak_bytes: Sequence[int]) -> list[tuple[int, int]] | None:
    """The highest and the lowest of the ranks' peaks; a collective, so all ranks have to call it.

    Args:
        trainer: the trainer.
        peak_bytes: of this rank, several figures at once.

    Returns:
        Highest and lowest of each figure; ``None`` where there is one rank only.
    """
    if trainer.world_size == 1:
        return None
    # The minimum is the maximum of the negatives: one collective for all.
    peaks = torch.tensor([size for peak in peak_bytes for size in (peak, -peak)])
    reduced = trainer.strategy.reduce(peaks.to(trainer.strategy.root_device), reduce_op="max")
    sizes = [abs(int(size)) for size in reduced.tolist()]
    return list(zip(sizes[::2], sizes[1::2], strict=True))
