"""A few steps of a Trainer on the twin of a CUDA device."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_memtrain.compat.lightning_private import MockOptimizer
from lightning_memtrain.compat.torch_private import FakeTensor, types_with_foreach, types_with_foreach_norms
from lightning_memtrain.core import ArgumentError, is_technique
from lightning_memtrain.core.compiled_modules import is_compiled
from lightning_memtrain.planning.prediction.ranks.default_sharding import prepare
from lightning_memtrain.planning.prediction.ranks.rank_strategy import strategy_of_first_rank
from lightning_memtrain.planning.prediction.ranks.world import World
from lightning_memtrain.planning.prediction.twin.moving import (
    configure_without_data,
    move,
    replace_when_moved,
)
from lightning_memtrain.planning.prediction.twin.twin_accelerator import TwinAccelerator
from lightning_memtrain.precision.activations import activation_packing
from lightning_memtrain.report import MemoryProfiler, MemoryReport
from lightning_memtrain.tracing.allocator import CachingAllocator
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE, TwinBackend, TwinDeviceMode, install
from lightning_memtrain.tracing.cuda_twin.arguments import CudaMeansTwin, make_from_values
from lightning_memtrain.tracing.cuda_twin.attention import AMPERE, TwinAttention
from lightning_memtrain.tracing.cuda_twin.autocast import TwinAutocast
from lightning_memtrain.tracing.cuda_twin.host_tensors import LargeWithoutData
from lightning_memtrain.tracing.device import Device

#: The first makes the optimizer's state, the second finds it, the third finds what the second left.
NUM_STEPS = 3


@dataclass(frozen=True)
class TwinRun:
    """What a run on the twin came to.

    Args:
        report: of its steps.
        allocated_bytes: most bytes in blocks of the allocator.
        reserved_bytes: most bytes that the allocator had from the device.
        workspace_bytes: what libraries keep.
        guessed: see :attr:`.TwinDeviceMode.guessed`.
        unmeasured: operators whose workspace is not known, and why; on a CPU.
        process_bytes: what the process has in memory beside model and batch; on a CPU.
        convolution_bytes: see :attr:`.TwinDeviceMode.convolution_bytes`.
        compiled: path of a module that the run would compile, and the twin does not; empty without one.
    """

    report: MemoryReport
    allocated_bytes: int
    reserved_bytes: int
    workspace_bytes: int
    guessed: Mapping[str, str]
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    process_bytes: int = 0
    convolution_bytes: int = 0
    compiled: str = ""


def run_on_twin(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    data: Any,
    trainer_options: Mapping[str, Any],
    device: Device,
    world: World | None = None,
) -> TwinRun:
    """Train for a few steps on the twin. Call it in a process of its own: torch is another one afterwards.

    Args:
        model: what is trained, or what makes it.
        data: a loader of batches, or a data module.
        trainer_options: arguments of Trainer.
        device: the GPU whose twin it is.
        world: the ranks of the run, of which the first is predicted; ``None`` for one device.

    Returns:
        What was counted.

    Raises:
        ArgumentError: if ``model`` is a function that returns something else.
    """
    backend = TwinBackend(CachingAllocator(), usable_bytes=device.usable_bytes)
    install(backend)

    def on_matrix_product() -> None:
        backend.hold_workspace("cuBLAS", device.cublas_workspace_bytes)
        backend.hold_workspace("cuBLASLt", device.cublaslt_workspace_bytes)

    mode = TwinDeviceMode(backend, on_matrix_product)
    rules = TwinAutocast(), TwinAttention(has_flash=(device.compute_capability or AMPERE) >= AMPERE)
    prepare_process()
    prepare_twin()
    with quiet_folder() as folder, contextlib.ExitStack() as undo:
        undo.enter_context(mode)
        undo.enter_context(CudaMeansTwin())
        if not isinstance(model, pl.LightningModule):
            with LargeWithoutData(mode):
                model = made_module(model)
        name = type(model).__name__  # sharding makes it one of a class of its own
        if world is not None:
            shards = prepare(model, world)
            move(model, mode, "cpu" if shards else DEVICE_TYPE)
        configure_without_data(model, LargeWithoutData(mode))
        profiler = MemoryProfiler(every_n_steps=1, report_dir=folder, max_rows=None)
        trainer = few_steps_trainer(_place(world, mode), trainer_options, profiler)
        trainer.fit(model, data)
        refuse_no_optimizer(trainer, model)
    del rules
    assert profiler.report is not None, "a fit that has ended has a report"
    return TwinRun(
        report=replace(profiler.report, model=name),
        allocated_bytes=backend.allocator.peak_allocated_bytes,
        reserved_bytes=backend.allocator.peak_reserved_bytes,
        workspace_bytes=backend.workspace_bytes,
        guessed=dict(mode.guessed),
        convolution_bytes=mode.convolution_bytes,
        compiled=next((name or "(model)" for name, one in model.named_modules() if is_compiled(one)), ""),
    )


@contextlib.contextmanager
def quiet_folder() -> Iterator[str]:
    """A folder for a report that nobody reads, while nothing is printed.

    Yields:
        The folder.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield folder


def few_steps_trainer(
    place: Mapping[str, Any], options: Mapping[str, Any], profiler: MemoryProfiler
) -> pl.Trainer:
    """A trainer that trains for three steps.

    Args:
        place: arguments of Trainer that say on which device, as which rank.
        options: other arguments of Trainer.
        profiler: watches every step.

    Returns:
        The trainer.
    """
    options = dict(options)
    callbacks = [*options.pop("callbacks", ()), profiler]
    for callback in callbacks:
        rehearse = getattr(callback, "rehearse", None)
        if is_technique(callback) and callable(rehearse):
            rehearse()
    return pl.Trainer(
        **place,
        max_steps=NUM_STEPS,
        # Steps of a module's own making may not be counted, and a batch is repeated without end.
        max_epochs=NUM_STEPS,
        limit_train_batches=NUM_STEPS * options.get("accumulate_grad_batches", 1),
        logger=DummyLogger(),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def _place(world: World | None, mode: TwinDeviceMode) -> dict[str, Any]:
    if world is None:
        return {"strategy": _OnTwin(mode), "devices": 1}
    return {
        "strategy": strategy_of_first_rank(world, TwinAccelerator()),
        "devices": world.devices_per_node,
        "num_nodes": world.num_nodes,
    }


class _OnTwin(SingleDeviceStrategy):
    """The twin is where the model goes when it would go to the GPU: after ``configure_model``."""

    def __init__(self, mode: TwinDeviceMode) -> None:
        super().__init__(torch.device(DEVICE_TYPE, 0), TwinAccelerator())
        self._mode = mode

    def model_to_device(self) -> None:
        """Put the model's tensors there."""
        assert self.model is not None, "Lightning connects the model first"
        move(self.model, self._mode)


def refuse_no_optimizer(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Refuse a run that trains nothing.

    Args:
        trainer: that has fitted.
        model: what was trained.

    Raises:
        ArgumentError: if the model has no optimizer.
    """
    # Lightning makes one that does nothing where there is none.
    has_optimizer = any(not isinstance(one, MockOptimizer) for one in trainer.optimizers)
    if model.automatic_optimization and not has_optimizer:
        raise ArgumentError(
            f"`predict(model)` needs a model with an optimizer, but `{type(model).__name__}."
            "configure_optimizers` returns none, so that nothing would be trained. Return one from there, "
            "or, with LightningCLI, name one under `optimizer`."
        )


def made_module(factory: Callable[[], Any]) -> pl.LightningModule:
    """What a function makes, if it is what can be trained.

    Args:
        factory: the function.

    Returns:
        The module.

    Raises:
        ArgumentError: if it is something else.
    """
    model = factory()
    if not isinstance(model, pl.LightningModule):
        raise ArgumentError(
            "`predict(model)` must be a LightningModule or a function that makes one, but the function "
            f"returned {type(model).__name__}. Return the LightningModule."
        )
    return model


def prepare_process() -> None:
    """What else has to be as in a real run, or silent, for the rest of this process."""
    replace_when_moved()
    _load_in_this_process()
    # Tensors without data keep their bytes as plain ones do.
    packing: Any = activation_packing
    packing.PLAIN_TENSORS = (*packing.PLAIN_TENSORS, FakeTensor)
    torch.autograd.set_multithreading_enabled(False)  # all of a step is watched in this thread
    warnings.simplefilter("ignore")  # the real run gives them
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Torch writes many lines where an operator has no rule for tensors without data.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def prepare_twin() -> None:
    """What else has to be as on a GPU, for the rest of this process."""
    make_from_values()
    # Optimizers and clipping take all parameters at once, as they do by default on CUDA.
    for types in (types_with_foreach, types_with_foreach_norms):
        types.append(FakeTensor)


def _load_in_this_process() -> None:
    """Let data loaders do without workers and pinned memory, for the sake of three batches."""
    loader: Any = DataLoader
    make = loader.__init__

    @functools.wraps(make)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(make).bind(self, *args, **kwargs).arguments
        for name in ("self", "num_workers", "pin_memory", *_OF_WORKERS):
            given.pop(name, None)
        make(self, **given)

    loader.__init__ = made


_OF_WORKERS = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout")
