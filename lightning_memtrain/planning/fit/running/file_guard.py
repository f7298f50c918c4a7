"""The guard of a plan that a configuration file names."""

from __future__ import annotations

from pathlib import Path

from lightning_memtrain.planning.fit.holding.plan_guard import PlanGuard
from lightning_memtrain.planning.fit.plan import Plan


class FileGuard(PlanGuard):
    """Stops a run for which the plan in a file was not made.

    Args:
        path: of :meth:`.Plan.save` or ``memtrain plan``.
    """

    def __init__(self, path: str) -> None:
        plan = Plan.load(Path(path))
        super().__init__(plan.fingerprint, plan.found.batch_shapes, plan.found.held_bytes, plan.spare_bytes)
