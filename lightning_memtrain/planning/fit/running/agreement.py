"""One plan for all ranks: made by the one with most to hold, and told to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.planning.fit.holding.circumstances import Circumstances
from lightning_memtrain.planning.fit.holding.plan_guard import PlanGuard
from lightning_memtrain.planning.fit.plan import Plan


def any_rank(trainer: pl.Trainer, here: bool) -> bool:
    """Whether something holds for one of the ranks; every rank has to call it.

    Args:
        trainer: the trainer that fits.
        here: whether it does for this one.

    Returns:
        The same on all ranks.
    """
    return _highest(trainer, int(here)) > 0 if trainer.world_size > 1 else here


def plan_of_largest(
    trainer: pl.Trainer, batch_bytes: int, make: Callable[[], tuple[Plan, Circumstances]]
) -> tuple[Plan, Circumstances]:
    """Let the rank with the largest batch make a plan, and all follow it; every rank has to call it.

    Args:
        trainer: the trainer that fits.
        batch_bytes: of this rank's batch.
        make: makes the plan for this rank, and says what for.

    Returns:
        The same on all ranks.

    Raises:
        MisconfigurationException: on all ranks, with what the one that planned could not do.
    """
    if trainer.world_size == 1:
        return make()
    largest = _highest(trainer, batch_bytes)
    planner = _highest(trainer, trainer.global_rank if batch_bytes == largest else -1)
    answer: tuple[Plan, Circumstances] | str = ""
    if trainer.global_rank == planner:
        try:
            plan, planned = make()
            told = replace(plan, found=replace(plan.found, predict_way=None))  # a function of this process
            answer = told, planned
        except Exception as failure:  # the other ranks wait for an answer
            answer = f"{failure}"
    answer = trainer.strategy.broadcast(answer, src=planner)
    if isinstance(answer, str):
        raise MisconfigurationException(f"On rank {planner}: {answer}")
    return answer


@contextmanager
def without_planners(trainer: pl.Trainer) -> Iterator[None]:
    """Leave callbacks out of a trainer that plan or watch a plan, since what they plan is to be predicted.

    Args:
        trainer: any.

    Yields:
        Nothing; the trainer has its own list again afterwards.
    """
    own: Any = trainer.callbacks  # type: ignore[attr-defined]
    found: Any = trainer
    found.callbacks = [one for one in own if not is_planner(one)]
    try:
        yield
    finally:
        found.callbacks = own


def is_planner(callback: Any) -> bool:
    """Whether a callback plans memory, or watches a plan.

    Args:
        callback: any.

    Returns:
        ``True`` for :class:`.FitMemory` and :class:`.PlanGuard`.
    """
    return isinstance(callback, PlanGuard) or getattr(type(callback), "plans_memory", False) is True


def _highest(trainer: pl.Trainer, value: int) -> int:
    # In float64, which tells bytes of any batch apart.
    tensor = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))
