"""What a run that has begun can still be given, and what a Trainer needs when it is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_memtrain.core import ArgumentError, format_bytes
from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.plan import Plan


def refuse_what_needs_a_trainer(allow: tuple[str, ...], plan: Plan | None) -> None:
    """Refuse what a Trainer has to be made with.

    Args:
        allow: what may change the result.
        plan: to follow; ``None`` for a new one.

    Raises:
        ArgumentError: if one of both asks for it, or the plan does not keep its limit.
    """
    for name in allow:
        if PERMISSIONS[name].needs_trainer:
            raise ArgumentError(
                f"`FitMemory(allow)` must name what a run that has begun can still be given, but got "
                f"{name!r}, which a Trainer needs when it is made. Use L.Trainer(**mt.plan(..., "
                f"allow=({name!r},)).trainer_kwargs())."
            )
    way = plan.chosen if plan is not None else None
    if plan is not None and (way is None or not plan.fits):
        raise ArgumentError(
            f"`FitMemory(plan)` must be a plan that keeps its limit of {format_bytes(plan.limit_bytes)}, but "
            "got one that does not. Print it for what it needs."
        )
    if way is not None and (way.trainer_arguments or way.by_hand or _plugins(way.techniques)):
        raise ArgumentError(
            f"`FitMemory(plan)` must be a plan of callbacks, but got {way}, a part of which a Trainer needs "
            "when it is made. Use L.Trainer(**plan.trainer_kwargs())."
        )


def _plugins(techniques: Iterable[Any]) -> bool:
    return any(one.place == "plugins" for one in techniques)
