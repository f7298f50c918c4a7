"""A trial: two steps of a run without data, in a copy of this process, with some techniques."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_memtrain.compat.torch_private import FakeTensorMode
from lightning_memtrain.ledger import OpWorkspace
from lightning_memtrain.planning.fit.trials.step_trace import StepTrace
from lightning_memtrain.planning.fit.trials.step_watch import StepWatch
from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.planning.prediction.twin.moving import move, replace_when_moved
from lightning_memtrain.planning.prediction.twin.twin_accelerator import TwinAccelerator
from lightning_memtrain.planning.prediction.twin.twin_run import _prepare_process
from lightning_memtrain.tracing.allocator import CachingAllocator
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE, TwinBackend, TwinDeviceMode, install
from lightning_memtrain.tracing.cuda_twin.arguments import CudaMeansTwin
from lightning_memtrain.tracing.cuda_twin.attention import AMPERE, TwinAttention
from lightning_memtrain.tracing.cuda_twin.autocast import TwinAutocast
from lightning_memtrain.tracing.device import Device
from lightning_memtrain.tracing.step.fake_mode import FakeStepMode
from lightning_memtrain.tracing.step.fake_parameters import FakeParameters
from lightning_memtrain.tracing.step.recorded_values import RecordedValues
from lightning_memtrain.tracing.step.value_methods import FakeValueMethods
from lightning_memtrain.tracing.user_state.capture import UserState

#: A model, or what makes it.
Model = pl.LightningModule | Callable[[], pl.LightningModule]


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
    torch.autograd.set_multithreading_enabled(False)  # all of a step is watched in this thread
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    replace_when_moved()
    with _quietly() as (undo, folder):
        if not isinstance(model, pl.LightningModule):
            with fake:
                model = model()
        state = UserState(model)
        parameters = FakeParameters(fake, model, [], state.tensors)
        values = RecordedValues()
        mode = FakeStepMode(fake, parameters.by_id, values)
        state.replace(parameters.by_id)
        watch = StepWatch(trial.num_chunks, OpWorkspace("cpu"), trial.with_calls)
        undo.enter_context(mode)
        undo.enter_context(FakeValueMethods(values, mode.knows))
        _fit(model, options, trial, watch, {"accelerator": "cpu", "default_root_dir": folder})
        return watch.trace()


def _on_twin(model: Model, options: Mapping[str, Any], device: Device, trial: Trial) -> StepTrace:
    backend = TwinBackend(CachingAllocator())
    install(backend)

    def on_matrix_product() -> None:
        backend.hold_workspace("cuBLAS", device.cublas_workspace_bytes)
        backend.hold_workspace("cuBLASLt", device.cublaslt_workspace_bytes)

    mode = TwinDeviceMode(backend, on_matrix_product)
    rules = TwinAutocast(), TwinAttention(has_flash=(device.compute_capability or AMPERE) >= AMPERE)
    _prepare_process()
    with _quietly() as (undo, folder):
        if not isinstance(model, pl.LightningModule):
            with mode.fake:
                model = model()
        watch = StepWatch(trial.num_chunks, None, trial.with_calls)
        undo.enter_context(mode)
        undo.enter_context(CudaMeansTwin())
        move(model, mode)
        strategy = SingleDeviceStrategy(torch.device(DEVICE_TYPE, 0), TwinAccelerator())
        _fit(model, options, trial, watch, {"strategy": strategy, "default_root_dir": folder})
    del rules
    return replace(
        watch.trace(),
        allocated_bytes=backend.allocator.peak_allocated_bytes,
        reserved_bytes=backend.allocator.peak_reserved_bytes,
        workspace_bytes=backend.workspace_bytes,
    )


def _fit(
    model: pl.LightningModule,
    options: Mapping[str, Any],
    trial: Trial,
    watch: StepWatch,
    where: Mapping[str, Any],
) -> None:
    given = {**options, **trial.trainer_arguments}
    made = [(place, _made(path, arguments)) for path, arguments, place in trial.techniques]
    for place in {place for place, _ in made}:
        given[place] = [*given.get(place, ()), *(one for at, one in made if at == place)]
    given["callbacks"] = [*given.get("callbacks", ()), watch]
    accumulated = given.get("accumulate_grad_batches", 1)
    trainer = pl.Trainer(
        devices=1,
        max_steps=2,
        max_epochs=2,
        limit_train_batches=2 * accumulated,
        logger=DummyLogger(),
        log_every_n_steps=1_000,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **where,
        **given,
    )
    batches = [trial.first_batch] * accumulated + [trial.batch] * accumulated
    trainer.fit(model, _Loader(batches))


class _Loader:
    """Yields what it is given, in each epoch."""

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


@contextmanager
def _quietly() -> Iterator[tuple[ExitStack, str]]:
    """Nothing is printed or warned of, which the real run does; and a folder for what is written."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, ExitStack() as undo:
        undo.enter_context(contextlib.redirect_stdout(nowhere))
        yield undo, folder
