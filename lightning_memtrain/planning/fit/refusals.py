"""What of a Trainer cannot be planned: its strategy, and techniques that a plan would choose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

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
    if not isinstance(strategy, (*in_both(SingleDeviceStrategy), *in_both(DDPStrategy))):
        return (
            f"must be on one device or under `ddp`, but got {name}, whose shards no plan is made for. Choose "
            "techniques by hand; for FSDP2 `predict(..., strategy='fsdp2')` says what they come to."
        )
    return ""
