"""A trial: two steps of a run without data, in a copy of this process, with some techniques."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl

from lightning_memtrain.ledger import OpWorkspace
from lightning_memtrain.planning.fit.trials.step_trace import StepTrace
from lightning_memtrain.planning.fit.trials.step_watch import StepWatch
from lightning_memtrain.planning.prediction.cpu.cpu_run import on_cpu
from lightning_memtrain.planning.prediction.few_steps import Model, few_steps_trainer, quiet_folder
from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.planning.prediction.twin.twin_place import on_twin
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
    """

    techniques: Sequence[tuple[str, Mapping[str, Any], str]]
    trainer_arguments: Mapping[str, Any]
    first_batch: Any
    batch: Any
    num_chunks: int = 1
    with_calls: bool = False


def run_trial(model: Model, options: Mapping[str, Any], device: Device, trial: Trial) -> StepTrace:
    """Run two steps without data.

    Args:
        model: what is trained, or what makes it.
        options: arguments of Trainer, as the run has them.
        device: the CPU, or a GPU by NVIDIA.
        trial: what is tried.

    Returns:
        What the second step held and ran.
    """
    run = _on_twin if device.is_cuda else _on_cpu
    return call_in_copy(lambda: run(model, options, device, trial))


def _on_cpu(model: Model, options: Mapping[str, Any], device: Device, trial: Trial) -> StepTrace:
    given = with_techniques(options, trial)
    with quiet_folder() as folder, on_cpu(model, given["callbacks"]) as place:
        watch = StepWatch(trial.num_chunks, OpWorkspace("cpu"), trial.with_calls)
        _fit(place.model, place.trainer_arguments, given, trial, watch, folder)
        return watch.trace()


def _on_twin(model: Model, options: Mapping[str, Any], device: Device, trial: Trial) -> StepTrace:
    given = with_techniques(options, trial)
    with quiet_folder() as folder, on_twin(model, device) as place:
        watch = StepWatch(trial.num_chunks, None, trial.with_calls)
        _fit(place.model, place.trainer_arguments, given, trial, watch, folder)
    return replace(
        watch.trace(),
        allocated_bytes=place.backend.allocator.peak_allocated_bytes,
        reserved_bytes=place.backend.allocator.peak_reserved_bytes,
        workspace_bytes=place.backend.workspace_bytes,
    )


def with_techniques(options: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """Arguments of Trainer, with what is tried.

    Args:
        options: those of the run.
        trial: what is tried.

    Returns:
        Both; the techniques are made anew.
    """
    given = {"callbacks": (), **options, **trial.trainer_arguments}
    made = [(place, _made(path, arguments)) for path, arguments, place in trial.techniques]
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
) -> None:
    trainer = few_steps_trainer(
        model, {**place, "default_root_dir": folder}, given, watch, num_steps=2, ends_with_data=True
    )
    accumulated = given.get("accumulate_grad_batches", 1)
    batches = [trial.first_batch] * accumulated + [trial.batch] * accumulated
    trainer.fit(model, BatchList(batches))


class BatchList:
    """Yields what it is given, in each epoch.

    Args:
        batches: at least one.
    """

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

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
    return value
