"""A few steps of a Trainer on the twin of a CUDA device."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_memtrain.core import MemoryBreakdown
from lightning_memtrain.report import MemoryProfiler, MemoryReport
from lightning_memtrain.tracing.allocator import CachingAllocator
from lightning_memtrain.tracing.cuda_twin.arguments import CudaMeansTwin, make_from_values
from lightning_memtrain.tracing.cuda_twin.attention import TwinAttention
from lightning_memtrain.tracing.cuda_twin.autocast import TwinAutocast
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend, install
from lightning_memtrain.tracing.cuda_twin.device_mode import TwinDeviceMode
from lightning_memtrain.tracing.user_state import UserState

_NUM_STEPS = 3


@dataclass(frozen=True)
class TwinRun:
    """What a run on the twin came to."""

    report: MemoryReport
    allocated_bytes: int
    reserved_bytes: int
    workspace_bytes: int
    guessed: dict[str, str]


class TwinAccelerator(Accelerator):
    """The twin, as Lightning sees it."""

    def setup_device(self, device: torch.device) -> None:
        """There is nothing to set up."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """It has none."""
        return {}

    def teardown(self) -> None:
        """There is nothing to take down."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """Any number."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """One by one."""
        return [torch.device(DEVICE_TYPE, index) for index in range(int(devices))]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def name() -> str:
        """As torch calls it."""
        return DEVICE_TYPE


def run_on_twin(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    data: Any,
    trainer_options: dict[str, Any],
    workspaces: dict[str, int],
) -> TwinRun:
    """Train for three steps on the twin. Call it in a process of its own.

    Args:
        model: what is trained, or what makes it.
        data: loaders of batches, or a data module.
        trainer_options: arguments of Trainer.
        workspaces: bytes that libraries keep from their first call on, by name.

    Returns:
        What was counted.
    """
    backend = TwinBackend(CachingAllocator())
    install(backend)
    make_from_values()
    rules = TwinAutocast(), TwinAttention()

    def on_matrix_product(func: Any) -> None:
        for name, num_bytes in workspaces.items():
            backend.hold_workspace(name, num_bytes)

    mode = TwinDeviceMode(backend, on_matrix_product)
    nn.Module._apply = _apply  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    torch.autograd.set_multithreading_enabled(False)  # all of a step is watched in this thread
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as inside:
        inside.enter_context(contextlib.redirect_stdout(open(os.devnull, "w")))  # noqa: SIM115
        if not isinstance(model, nn.Module):
            with mode.fake:
                model = model()
        profiler = MemoryProfiler(every_n_steps=1, report_dir=folder, max_rows=None)
        options = {"max_steps": _NUM_STEPS, **trainer_options}
        callbacks = [*options.pop("callbacks", ()), profiler]
        trainer = pl.Trainer(
            strategy=SingleDeviceStrategy(torch.device(DEVICE_TYPE, 0), TwinAccelerator()),
            devices=1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **options,
        )
        inside.enter_context(mode)
        inside.enter_context(CudaMeansTwin())
        move(model, mode)
        trainer.fit(model, data)
    del rules
    return TwinRun(
        report=profiler.report,
        allocated_bytes=backend.allocator.peak_allocated_bytes,
        reserved_bytes=backend.allocator.peak_reserved_bytes,
        workspace_bytes=backend.workspace_bytes,
        guessed=dict(mode.guessed),
    )


def move(model: nn.Module, mode: TwinDeviceMode) -> None:
    """Put twins in the place of a module's parameters and buffers, wherever they are held."""
    others: dict[int, Tensor] = {}
    for parameter in model.parameters():
        others[id(parameter)] = nn.Parameter(mode.moved(parameter), parameter.requires_grad)
    for buffer in model.buffers():
        twin = mode.moved(buffer)
        others[id(buffer)] = twin
        from torch._subclasses.fake_tensor import FakeTensor

        if not isinstance(buffer, FakeTensor) and buffer.device.type == "cpu":
            mode.known.set(twin, buffer.detach())
    UserState(model).replace(others)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's own, but that other tensors take the place of parameters, shared ones once."""
    memo: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            with torch.no_grad():
                memo[id(tensor)] = fn(tensor)
        return memo[id(tensor)]

    for module in self.modules() if recurse else [self]:
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            now = changed(parameter)
            if now is not parameter:
                if not isinstance(now, nn.Parameter):
                    now = memo[id(parameter)] = nn.Parameter(now, parameter.requires_grad)
                module._parameters[key] = now
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = changed(buffer)
    return self
