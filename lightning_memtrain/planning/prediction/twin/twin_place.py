"""A run put on the twin of a CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_memtrain.compat.lightning_packages import namesake
from lightning_memtrain.compat.torch_private import FakeTensor, types_with_foreach, types_with_foreach_norms
from lightning_memtrain.planning.prediction.few_steps import Model, is_module, made_module, prepare_process
from lightning_memtrain.planning.prediction.moving import configure_without_data, move
from lightning_memtrain.planning.prediction.ranks.default_sharding import prepare
from lightning_memtrain.planning.prediction.ranks.rank_strategy import strategy_of_first_rank
from lightning_memtrain.planning.prediction.ranks.world import World
from lightning_memtrain.planning.prediction.twin.twin_accelerator import twin_accelerator
from lightning_memtrain.tracing.allocator import CachingAllocator
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE, TwinBackend, TwinDeviceMode, install
from lightning_memtrain.tracing.cuda_twin.arguments import CudaMeansTwin, make_from_values
from lightning_memtrain.tracing.cuda_twin.host_tensors import LargeWithoutData
from lightning_memtrain.tracing.cuda_twin.operators.attention import AMPERE, TwinAttention
from lightning_memtrain.tracing.cuda_twin.operators.autocast import TwinAutocast
from lightning_memtrain.tracing.device import Device


@dataclass(frozen=True)
class TwinPlace:
    """A run on the twin.

    Args:
        model: what is trained there.
        model_name: of its class; sharding makes it one of a class of its own.
        trainer_arguments: arguments of Trainer that say where.
        backend: holds what is allocated.
        mode: knows what is known of the tensors.
    """

    model: pl.LightningModule
    model_name: str
    trainer_arguments: dict[str, Any]
    backend: TwinBackend
    mode: TwinDeviceMode


@contextmanager
def on_twin(model: Model, device: Device, world: World | None = None) -> Iterator[TwinPlace]:
    """Put a run on the twin. Call it in a process of its own: torch is another one afterwards.

    Args:
        model: what is trained, or what makes it.
        device: the GPU whose twin it is.
        world: the ranks of the run, of which the first goes there; ``None`` for one device.

    Yields:
        The run, while its steps may be made.
    """
    seen_bytes = device.total_bytes - device.driver_bytes  # as `torch.cuda.mem_get_info` has it
    backend = TwinBackend(CachingAllocator(), usable_bytes=device.usable_bytes, total_bytes=seen_bytes)
    install(backend)

    def on_matrix_product() -> None:
        backend.hold_workspace("cuBLAS", device.cublas_workspace_bytes)
        backend.hold_workspace("cuBLASLt", device.cublaslt_workspace_bytes)

    mode = TwinDeviceMode(backend, on_matrix_product)
    rules = TwinAutocast(), TwinAttention(has_flash=(device.compute_capability or AMPERE) >= AMPERE)
    prepare_process()
    _prepare_twin()
    with mode, CudaMeansTwin():
        if not is_module(model):
            with LargeWithoutData(mode):
                model = made_module(model)
        name = type(model).__name__
        # What techniques do to the weights they do before, where there are any.
        shards = world is not None and prepare(model, world)
        before = functools.partial(move, model, mode, "cpu") if shards else _nothing
        configure_without_data(model, LargeWithoutData(mode), before)
        yield TwinPlace(model, name, _place(world, mode, model), backend, mode)
    del rules


def _nothing() -> None:
    return None


def _prepare_twin() -> None:
    """What else has to be as on a GPU, for the rest of this process."""
    make_from_values()
    # Optimizers and clipping take all parameters at once, as they do by default on CUDA.
    for types in (types_with_foreach, types_with_foreach_norms):
        types.append(FakeTensor)


def _place(world: World | None, mode: TwinDeviceMode, model: pl.LightningModule) -> dict[str, Any]:
    if world is None:
        return {"strategy": _on_twin(mode, model), "devices": 1}
    return {
        "strategy": strategy_of_first_rank(world, twin_accelerator(model), mode, model),
        "devices": world.devices_per_node,
        "num_nodes": world.num_nodes,
    }


def _on_twin(mode: TwinDeviceMode, like: pl.LightningModule) -> SingleDeviceStrategy:
    """The twin is where the model goes when it would go to the GPU: after ``configure_model``."""

    class OnTwin(namesake(SingleDeviceStrategy, like)):  # type: ignore[misc]
        def model_to_device(self) -> None:
            assert self.model is not None, "Lightning connects the model first"
            move(self.model, mode)

    return OnTwin(torch.device(DEVICE_TYPE, 0), twin_accelerator(like))
