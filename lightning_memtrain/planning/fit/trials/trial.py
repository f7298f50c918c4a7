"""A trial: a few steps of a run without data, with some techniques."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_memtrain.compat.lightning_packages import namesake
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.ledger import OpWorkspace
from lightning_memtrain.planning.fit.trials.run_progress import RunProgress
from lightning_memtrain.planning.fit.trials.step_trace import StepTrace
from lightning_memtrain.planning.fit.trials.step_watch import StepWatch
from lightning_memtrain.planning.prediction.cpu.cpu_run import on_cpu
from lightning_memtrain.planning.prediction.few_steps import Model, few_steps_trainer, is_module, quiet_folder
from lightning_memtrain.planning.prediction.twin.twin_place import TwinPlace
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE
from lightning_memtrain.tracing.device import Device


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Args:
        techniques: class paths with their arguments, and the argument of Trainer that takes them.
        trainer_arguments: further arguments of Trainer by name.
        first_batch: one that makes the optimizer's state.
        batch: the one that is watched.
        num_chunks: calls of ``training_step`` for it.
        with_calls: whether module calls are followed.
        progress: of the run that it stands for.
        most_seconds: after so many it is given up; ``None`` for never.
    """

    techniques: Sequence[tuple[str, Mapping[str, Any], str]]
    trainer_arguments: Mapping[str, Any]
    first_batch: Any
    batch: Any
    num_chunks: int = 1
    with_calls: bool = False
    progress: RunProgress = field(default_factory=RunProgress)
    most_seconds: float | None = None


def trial_on_cpu(model: Model, options: Mapping[str, Any], device: Device, trial: Trial) -> StepTrace:
    """Run a few steps on CPU tensors without data. Call it in a process of its own.

    Args:
        model: what is trained, or what makes it.
        options: arguments of Trainer, as the run has them.
        device: the CPU.
        trial: what is tried.

    Returns:
        What the steps after the first one held and ran.
    """
    given = with_techniques(model, options, device, trial)
    with quiet_folder() as folder, on_cpu(model, given["callbacks"]) as place:
        watch = StepWatch(trial.num_chunks, OpWorkspace("cpu"), trial.with_calls)
        _fit(place.model, place.trainer_arguments, given, trial, watch, folder, knows_values=False)
        return watch.trace()


def trial_on_twin(place: TwinPlace, given: Mapping[str, Any], trial: Trial) -> StepTrace:
    """Run a few steps on the twin of a GPU. Call it in a process of its own.

    Args:
        place: the run on the twin, of which nothing has run.
        given: arguments of Trainer, with what is tried.
        trial: what is tried.

    Returns:
        What the steps after the first one held and ran.
    """
    watch = StepWatch(trial.num_chunks, None, trial.with_calls)
    with quiet_folder() as folder:
        _fit(place.model, place.trainer_arguments, given, trial, watch, folder, knows_values=True)
    return replace(
        watch.trace(),
        allocated_bytes=place.backend.allocator.peak_allocated_bytes,
        reserved_bytes=place.backend.allocator.peak_reserved_bytes,
        workspace_bytes=place.backend.workspace_bytes,
    )


def with_techniques(model: Model, options: Mapping[str, Any], device: Device, trial: Trial) -> dict[str, Any]:
    """Arguments of Trainer, with what is tried.

    Args:
        model: what is trained, or what makes it.
        options: those of the run.
        device: what the run uses.
        trial: what is tried.

    Returns:
        Both; the techniques are made anew.

    Raises:
        ArgumentError: if ``precision`` is among the arguments that are tried, and is none that can be.
    """
    given = {"callbacks": (), **options, **trial.trainer_arguments}
    precision = given.pop("precision", None)
    made = [(place, _made(path, arguments)) for path, arguments, place in trial.techniques]
    if precision is not None:
        made.append(("plugins", _precision(model, precision, device)))
    for place in {place for place, _ in made}:
        given[place] = [*given.get(place, ()), *(one for at, one in made if at == place)]
    return given


def _fit(
    model: pl.LightningModule,
    place: Mapping[str, Any],
    given: Mapping[str, Any],
    trial: Trial,
    watch: StepWatch,
    folder: str,
    *,
    knows_values: bool,
) -> None:
    place = {**place, "default_root_dir": folder}
    num_steps = watch.num_steps(model)
    trainer = few_steps_trainer(
        model, place, given, watch, num_steps=num_steps, max_epochs=1, knows_values=knows_values
    )
    trial.progress.give_to(trainer)
    accumulated = given.get("accumulate_grad_batches", 1)
    batches = [trial.first_batch] * accumulated + [trial.batch] * accumulated * (num_steps - 1)
    trainer.fit(model, BatchList(batches))


def _precision(model: Model, precision: Any, device: Device) -> Any:
    """What Trainer makes of ``precision``, which looks at the name of the device."""
    if not str(precision).endswith("-mixed"):
        raise ArgumentError(
            f"`Plan.edit(precision)` must be 'bf16-mixed' or '16-mixed' to be predicted, but got "
            f"{precision!r}. Use LowPrecision for weights in 16 bits."
        )
    kind: Any = namesake(MixedPrecision, model if is_module(model) else pl.LightningModule)
    return kind(precision, DEVICE_TYPE if device.is_cuda else "cpu")


class BatchList:
    """Yields what it is given, in each epoch.

    Args:
        batches: at least one.
    """

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def _made(class_path: str, arguments: Mapping[str, Any]) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)(
        **{key: _value(value) for key, value in arguments.items()}
    )


def _value(value: Any) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return _made(value["class_path"], value.get("init_args") or {})
    return [_value(one) for one in value] if isinstance(value, (list, tuple)) else value
