"""Sharding by FSDP2 for a model that does not say itself how."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_memtrain.checkpointing.repeated_blocks import repeated_blocks
from lightning_memtrain.compat.lightning_packages import in_both, namesake
from lightning_memtrain.planning.prediction.ranks.world import World


def prepare(model: pl.LightningModule, world: World) -> bool:
    """Let a module shard itself where the run asks for it and the module does not.

    Args:
        model: as the user gave it.
        world: the ranks.

    Returns:
        Whether it is sharded when fit begins, and is to stay on the CPU until then.
    """
    if world.shards_by_default and not namesake(is_overridden, model)("configure_model", model):
        model.configure_model = lambda: shard_by_block(model)  # type: ignore[method-assign]
    return isinstance(world.strategy, in_both(ModelParallelStrategy))


def shard_by_block(model: pl.LightningModule) -> None:
    """Shard a module by FSDP2: each repeated block, then the rest.

    Args:
        model: a module that a trainer with a mesh of devices has.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    devices: Any = model.device_mesh
    mesh = devices["data_parallel"]
    for chain in repeated_blocks(model):
        for _, block in chain:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "training_step")  # Lightning calls it instead of `forward`
