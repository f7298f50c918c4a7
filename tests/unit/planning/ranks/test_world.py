"""Ranks and strategy go together, and what cannot be predicted is refused in words."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_memtrain.planning.prediction.ranks.world import world_of
from lightning_memtrain.planning.prediction.trainer_options import trainer_options


def trainer(**options: Any) -> pl.Trainer:
    options = {"devices": 1} | options
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


def test_one_device_has_no_world() -> None:
    assert world_of(None, None, None) is None
    assert world_of(trainer(), None, None) is None


def test_a_trainer_says_both() -> None:
    world = world_of(trainer(devices=4, num_nodes=2, strategy="ddp"), None, None)
    assert world is not None
    assert (world.size, world.num_nodes, world.devices_per_node, world.name) == (8, 2, 4, "ddp")
    world = world_of(trainer(devices=4), None, None)  # Lightning's default for several
    assert world is not None
    assert (world.size, world.name) == (4, "ddp")
    world = world_of(trainer(devices=1, strategy="ddp"), None, None)  # there are buckets, too
    assert world is not None
    assert world.size == 1


def test_arguments_go_beside_a_trainer_for_one_device() -> None:
    world = world_of(trainer(), 64, "fsdp2")
    assert world is not None
    assert (world.size, world.num_nodes, world.name, world.shards_by_default) == (64, 1, "fsdp2", True)
    world = world_of(trainer(strategy="ddp"), 16, None)
    assert world is not None
    assert (world.size, world.name) == (16, "ddp")
    world = world_of(trainer(devices=2, num_nodes=4), 8, ModelParallelStrategy(8, 1))
    assert world is not None
    assert (world.num_nodes, world.name, world.shards_by_default) == (4, "fsdp2", False)


def test_one_of_the_two_is_missing() -> None:
    with pytest.raises(ValueError, match=r"needs a strategy, .* what 8 ranks hold, but got none\. Add"):
        world_of(None, 8, None)
    with pytest.raises(ValueError, match=r"needs a strategy"):
        world_of(trainer(), 8, None)
    for given in (None, trainer()):
        with pytest.raises(ValueError, match=r"needs the number of ranks, but got strategy='ddp' without"):
            world_of(given, None, "ddp")


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "must be at least 1, but got 0"),
        (-8, ValueError, "must be at least 1, but got -8"),
        ("8", TypeError, "must be a number of ranks, but got '8'. Pass an integer"),
        (True, TypeError, "must be a number of ranks, but got True"),
        (2.0, TypeError, "must be a number of ranks, but got 2.0"),
    ],
)
def test_sizes_that_make_no_sense(size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        world_of(None, size, "ddp")


def test_two_sizes() -> None:
    said = r"world_size=16 and a trainer of 8 ranks \(2 node\(s\) of 4 device\(s\)\)\. Leave world_size out"
    with pytest.raises(ValueError, match=said):
        world_of(trainer(devices=4, num_nodes=2, strategy="ddp"), 16, "ddp")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp", r"but got 'fsdp': FSDP1 packs weights .* Predict strategy=\"fsdp2\""),
        ("fsdp_cpu_offload", "FSDP1"),
        (FSDPStrategy(), "but got 'FSDPStrategy': FSDP1"),
        (DeepSpeedStrategy.__new__(DeepSpeedStrategy), "but got 'DeepSpeedStrategy': DeepSpeed has buffers"),
        ("deepspeed_stage_3", "but got 'deepspeed_stage_3': DeepSpeed has buffers"),
        ("dpp", "must be Lightning's name of a DDP strategy, such as 'ddp', or 'fsdp2', .* but got 'dpp'"),
        ("single_device", "but got 'single_device'"),
        (SingleDeviceStrategy("cpu"), "but got SingleDeviceStrategy"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_strategies_that_are_not_predicted(strategy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        world_of(None, 8, strategy)


def test_a_class_is_no_strategy() -> None:
    with pytest.raises(TypeError, match="must be Lightning's name of a DDP strategy"):
        world_of(None, 8, DDPStrategy)  # type: ignore[arg-type]


def test_batch_normalisation_over_all_ranks_is_refused() -> None:
    several = trainer(devices=2, strategy="ddp", sync_batchnorm=True)
    with pytest.raises(ValueError, match=r"got sync_batchnorm=True, .* Predict with sync_batchnorm=False"):
        trainer_options(several, world_of(several, None, None))
