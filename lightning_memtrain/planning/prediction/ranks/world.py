"""How many ranks a run has, and what they exchange: from arguments, or from a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import strategies
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_memtrain.compat.lightning_packages import in_both, namesake, package_of
from lightning_memtrain.core import ArgumentError

#: What FSDP2 is called here; Lightning has no word for it but its strategy's class.
FSDP2 = "fsdp2"

_OWN_WORDS = {"model_parallel": FSDP2, FSDP2: FSDP2}
_FROM = (
    "Lightning's name of a DDP strategy, such as 'ddp', or 'fsdp2', or a DDPStrategy or ModelParallelStrategy"
)


@dataclass(frozen=True)
class World:
    """The ranks of a run.

    Args:
        strategy: as the run will have it.
        devices_per_node: at least 1.
        num_nodes: at least 1.
        shards_by_default: whether the model is sharded by its repeated blocks where it does not do so itself.
        given_name: what the user called the strategy; empty for an object.
    """

    strategy: Strategy
    devices_per_node: int
    num_nodes: int = 1
    shards_by_default: bool = False
    given_name: str = ""

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.devices_per_node * self.num_nodes

    @property
    def name(self) -> str:
        """What the strategy is called in a prediction."""
        return FSDP2 if isinstance(self.strategy, in_both(ModelParallelStrategy)) else "ddp"

    def strategy_for(self, model: pl.LightningModule) -> Strategy:
        """The strategy, of the package that a module is of if the user has only named it.

        Args:
            model: what is trained.

        Returns:
            The strategy.
        """
        if self.given_name and package_of(model) != package_of(self.strategy):
            return _named(self.given_name, self.size, like=model)
        return self.strategy


def world_of(
    trainer: pl.Trainer | None, world_size: int | None, strategy: str | Strategy | None
) -> World | None:
    """The ranks that a prediction is for.

    Args:
        trainer: as the run will have it, ``None`` for none.
        world_size: how many ranks, on however many nodes; ``None`` for the trainer's.
        strategy: what Lightning calls it, ``"fsdp2"``, or an object; ``None`` for the trainer's.

    Returns:
        The ranks; ``None`` for a run on one device without a strategy for several.

    Raises:
        ArgumentError: if an argument is something else, if one of the two is missing, or if they cannot be
            predicted.
    """
    theirs = None if trainer is None or _is_single(trainer) else trainer.strategy
    if world_size is not None:
        _check_size(world_size, trainer)
    if strategy is None and theirs is None:
        if world_size is not None:
            raise ArgumentError(
                f"`predict(world_size)` needs a strategy, which decides on what {world_size} ranks hold, but "
                'got none. Add strategy="ddp" or strategy="fsdp2", or pass a trainer that has one.'
            )
        return None
    if world_size is None and (trainer is None or _is_single(trainer)):
        raise ArgumentError(
            f"`predict(strategy)` needs the number of ranks, but got strategy={strategy!r} without one. Add "
            "world_size=8, or pass a trainer with `devices=8`."
        )
    size = trainer.world_size if world_size is None else world_size  # type: ignore[union-attr]
    if strategy is None or isinstance(strategy, in_both(Strategy)):  # type: ignore[type-abstract]
        given = theirs if strategy is None else strategy
        _refuse_others(given)
        return World(given, *_nodes(trainer, size))  # type: ignore[arg-type]
    if not isinstance(strategy, str):
        raise ArgumentError(f"`predict(strategy)` must be {_FROM}, but got {strategy!r}.")
    return World(
        _named(strategy, size, like=trainer),
        *_nodes(trainer, size),
        shards_by_default=strategy in _OWN_WORDS,
        given_name=strategy,
    )


def _is_single(trainer: pl.Trainer) -> bool:
    return trainer.world_size == 1 and isinstance(trainer.strategy, in_both(SingleDeviceStrategy))


def _nodes(trainer: pl.Trainer | None, size: int) -> tuple[int, int]:
    """Devices of a node, and nodes: the trainer's if it has as many ranks, else one node of all."""
    if trainer is not None and trainer.world_size == size:
        return trainer.num_devices, trainer.num_nodes
    return size, 1


def _check_size(world_size: Any, trainer: pl.Trainer | None) -> None:
    if not isinstance(world_size, int) or isinstance(world_size, bool):
        raise ArgumentError(
            f"`predict(world_size)` must be a number of ranks, but got {world_size!r}. Pass an integer."
        )
    if world_size < 1:
        raise ArgumentError(
            f"`predict(world_size)` must be at least 1, but got {world_size}. Pass the number of ranks."
        )
    if trainer is not None and trainer.world_size not in (1, world_size):
        raise ArgumentError(
            f"`predict(world_size)` must be what the trainer has, but got world_size={world_size} and a "
            f"trainer of {trainer.world_size} ranks ({trainer.num_nodes} node(s) of {trainer.num_devices} "
            "device(s)). Leave world_size out, or pass a trainer for one device."
        )


def _named(name: str, size: int, like: object) -> Strategy:
    if name in _OWN_WORDS:
        return namesake(ModelParallelStrategy, like)(data_parallel_size=size, tensor_parallel_size=1)
    if name.startswith("fsdp"):
        raise ArgumentError(_instead_of_fsdp1(name))
    if name.startswith("deepspeed"):  # whose strategy is one of DDP's to Lightning
        raise ArgumentError(_instead_of_deepspeed(name))
    registry = namesake(strategies, like).StrategyRegistry
    known = registry.available_strategies()
    if name in known and issubclass(registry[name]["strategy"], in_both(DDPStrategy)):
        found: Strategy = registry.get(name)
        return found
    raise ArgumentError(f"`predict(strategy)` must be {_FROM}, but got {name!r}.")


def _refuse_others(strategy: Any) -> None:
    shown = type(strategy).__name__
    if isinstance(strategy, in_both(FSDPStrategy)):
        raise ArgumentError(_instead_of_fsdp1(shown))
    if isinstance(strategy, in_both(DeepSpeedStrategy)):  # a subclass of DDPStrategy
        raise ArgumentError(_instead_of_deepspeed(shown))
    if not isinstance(strategy, (*in_both(DDPStrategy), *in_both(ModelParallelStrategy))):
        raise ArgumentError(f"`predict(strategy)` must be {_FROM}, but got {shown}.")


def _instead_of_fsdp1(shown: str) -> str:
    return (
        f"`predict(strategy)` must be one whose steps are predicted, but got {shown!r}: FSDP1 packs weights "
        'into flat ones, and frees them when CUDA is done. Predict strategy="fsdp2", which shards weights, '
        "gradients and optimizer state alike, or move to it: Lightning's `ModelParallelStrategy` and "
        "`fully_shard`."
    )


def _instead_of_deepspeed(shown: str) -> str:
    return (
        f"`predict(strategy)` must be one whose steps are predicted, but got {shown!r}: DeepSpeed has "
        'buffers, and an optimizer, of its own. Predict strategy="fsdp2", which shards what ZeRO stage 3 '
        "shards; DeepSpeed's buffers (`allgather_bucket_size`, `reduce_bucket_size`) come on top."
    )
