"""A strategy for several ranks, made to run on the first of them alone."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_memtrain.compat.lightning_packages import in_both
from lightning_memtrain.compat.lightning_private import alone, register_comm_hook
from lightning_memtrain.planning.prediction.moving import move
from lightning_memtrain.planning.prediction.ranks.lone_process_group import BACKEND, register
from lightning_memtrain.planning.prediction.ranks.world import World
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE, TwinDeviceMode


class FirstOfMany(ClusterEnvironment):
    """The first process of a cluster, the others of which nobody has to start.

    Args:
        size: how many there are said to be.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    @property
    def creates_processes_externally(self) -> bool:
        """So that Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Nobody asks there."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Nobody asks there."""
        return 0

    @staticmethod
    def detect() -> bool:
        """It is never found, only given."""
        return False

    def world_size(self) -> int:
        """How many there are said to be."""
        return self._size

    def set_world_size(self, size: int) -> None:
        """It stays what it is."""

    def global_rank(self) -> int:
        """The first."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """It stays the first."""

    def local_rank(self) -> int:
        """The first of its node."""
        return 0

    def node_rank(self) -> int:
        """On the first node."""
        return 0


def strategy_of_first_rank(
    world: World, accelerator: Accelerator, mode: TwinDeviceMode, model: pl.LightningModule
) -> Strategy:
    """The run's strategy on its first rank. Call it in a process of its own: it starts `torch.distributed`.

    Args:
        world: the ranks.
        accelerator: of the twin.
        mode: makes the tensors that are put in the place of the model's own when it goes there.
        model: what is trained.

    Returns:
        A copy of the strategy, for a trainer.
    """
    register()
    store: Any = vars(dist)["HashStore"]()  # of this process, so that no others are waited for
    dist.init_process_group(BACKEND, rank=0, world_size=world.size, store=store)
    strategy = copy.copy(world.strategy_for(model))
    alone(strategy, BACKEND)
    strategy.accelerator = accelerator
    anything: Any = strategy
    anything.cluster_environment = FirstOfMany(world.size)
    anything.parallel_devices = [torch.device(DEVICE_TYPE, index) for index in range(world.devices_per_node)]
    if isinstance(strategy, in_both(DDPStrategy)):
        # Lightning registers hooks on CUDA alone, by the device's name.
        anything._register_ddp_hooks = lambda: register_comm_hook(strategy)
        anything.model_to_device = lambda: move(model, mode)
    return strategy
