"""What of a Trainer cannot be planned: its strategy, and techniques that a plan would choose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_memtrain.checkpointing import ActivationCheckpointing
from lightning_memtrain.checkpointing.experimental import OffloadActivations
from lightning_memtrain.compat.lightning_packages import in_both
from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.optimizer_in_backward import OptimizerInBackward

#: What a plan may choose without being asked; what changes the result is the user's own to choose.
CHOSEN_BY_PLANS: tuple[type, ...] = (
    Microbatching,
    ActivationCheckpointing,
    OptimizerInBackward,
    OffloadActivations,
)


def own_choice(callbacks: Iterable[Any]) -> Any:
    """A callback that a plan would choose by itself.

    Args:
        callbacks: of a trainer.

    Returns:
        The first one; ``None`` if there is none.
    """
    return next((one for one in callbacks if isinstance(one, CHOSEN_BY_PLANS)), None)


def refusal_of_own(callbacks: Iterable[Any]) -> str:
    """Why a run with such a callback cannot be planned.

    Args:
        callbacks: of its trainer.

    Returns:
        The rest of a sentence, with the cure; empty if it can be.
    """
    one = own_choice(callbacks)
    if one is None:
        return ""
    name = type(one).__name__
    return (
        f"chooses {name} by itself, with its settings, but the Trainer has {one.technique_record()} already. "
        f"Take it out of `callbacks`; to keep it as it is, do without a plan."
    )


def strategy_refusal(strategy: Any) -> str:
    """Why a strategy cannot be planned for.

    Args:
        strategy: a trainer's.

    Returns:
        The rest of a sentence, with the cure; empty if it can be.
    """
    name = type(strategy).__name__
    if isinstance(strategy, in_both(DeepSpeedStrategy)) or strategy.handles_gradient_accumulation:
        return (
            f"must leave batches, backward and optimizer to Lightning, but got {name}, which has settings of "
            "its own for microbatches, recomputation and offload. Use those, or another strategy."
        )
    if isinstance(strategy, in_both(FSDPStrategy)):
        return (
            f"must be on one device, under `ddp` or FSDP2, but got {name}, that is FSDP1, which packs "
            "weights into flat ones and whose steps nobody can predict. Move to `ModelParallelStrategy` and "
            "`fully_shard`, or choose techniques by hand."
        )
    if not isinstance(strategy, (*in_both(SingleDeviceStrategy), *in_both(DDPStrategy))) and not is_fsdp2(
        strategy
    ):
        return (
            f"must be on one device, under `ddp` or FSDP2, but got {name}, whose shards no plan is made for. "
            "Choose techniques by hand."
        )
    return ""


def is_fsdp2(strategy: Any) -> bool:
    """Whether a strategy shards by `fully_shard`.

    Args:
        strategy: a trainer's.

    Returns:
        ``True`` for Lightning's ``ModelParallelStrategy``.
    """
    return isinstance(strategy, in_both(ModelParallelStrategy))


def refusal_within_fsdp2(strategy: Any, has_plan: bool) -> str:
    """Why a run that has sharded its model cannot be planned any more.

    Args:
        strategy: a trainer's.
        has_plan: whether it is there already.

    Returns:
        The rest of a sentence, with the cure; empty if it can be, or need not.
    """
    if has_plan or not is_fsdp2(strategy):
        return ""
    return (
        "plans within the run, but FSDP2 shards the model before it begins, and a plan is made of the whole. "
        "Make it before: FitMemory(plan=mt.plan(model, data, trainer=trainer, device=...))."
    )
