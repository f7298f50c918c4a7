"""What a callback says of a plan."""

from __future__ import annotations

from lightning_memtrain.core import format_bytes
from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.plan import Plan


def in_words(plan: Plan) -> str:
    """Say in a line what a plan does.

    Args:
        plan: that is followed.

    Returns:
        The way with its bytes and its time.
    """
    way = plan.chosen
    assert way is not None, "asked of plans that are followed"
    needed_bytes = plan.needed_bytes(way)
    of = format_bytes(plan.limit_bytes)
    if needed_bytes is None:
        return f"{way}, not predicted, of {of}"
    if way.is_plain:
        return f"the run fits as it is: {format_bytes(needed_bytes)} of {of}, so nothing is done"
    time = "" if way.time_ratio is None else f", {way.time_ratio:.2f} times the time"
    return f"{way}: {format_bytes(needed_bytes)} of {of}{time}"


def cure(plan: Plan) -> str:
    """Say what to do about a limit that cannot be kept.

    Args:
        plan: that found no way.

    Returns:
        A sentence.
    """
    helping = [name for name, num_bytes in plan.floor.unlocks if num_bytes <= plan.limit_bytes]
    by_hand = [way for way in plan.found.offered if way.by_hand and plan.keeps_limit(way)]
    if not helping and by_hand:
        return f"It would fit with a line of yours: {by_hand[0].by_hand[0]}"
    if not helping:
        return "Raise the limit, or use a smaller batch or model."
    names = tuple(helping[0].split(","))
    if any(PERMISSIONS[name].needs_trainer for name in names):
        return f"Use L.Trainer(**mt.plan(..., allow={names!r}).trainer_kwargs())."
    return f"Use FitMemory(..., allow={names!r})."
