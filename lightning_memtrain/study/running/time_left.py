"""How long a study will still take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Running:
    """A run that is under way.

    Args:
        variant: of which variant.
        seconds: how long it has run.
        fraction: how much of its steps is done, in ``[0, 1]``.
    """

    variant: str
    seconds: float
    fraction: float


def seconds_left(
    finished: Mapping[str, Sequence[float]], running: Sequence[Running], waiting: Sequence[str], jobs: int
) -> float | None:
    """Estimate the time until the last run ends.

    A run under way goes on at the pace that it has had. One that waits takes as long as the runs of its
    variant that are finished, or else as all that is known of others in the mean.

    Args:
        finished: seconds of runs that are over, by variant.
        running: runs that are under way.
        waiting: the variant of each run that is still to begin.
        jobs: runs at a time, at least 1.

    Returns:
        Seconds; ``None`` as long as nothing is known.

    Example:
        >>> seconds_left({"plain": [60.0, 80.0]}, [Running("bf16", 30.0, 0.25)], ["plain", "plain"], jobs=2)
        115.0
    """
    projected = [run.seconds / run.fraction for run in running if run.fraction > 0]
    known = [seconds for runs in finished.values() for seconds in runs] + projected
    if not known:
        return 0.0 if not running and not waiting else None

    def whole(variant: str) -> float:
        return fmean(finished.get(variant) or known)

    left = [
        max(0.0, (run.seconds / run.fraction if run.fraction > 0 else whole(run.variant)) - run.seconds)
        for run in running
    ]
    still = left + [whole(variant) for variant in waiting]
    return max(sum(still) / jobs, max(still, default=0.0))
