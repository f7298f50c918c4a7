"""Plans for batches of several kinds, and which of them holds for the one at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_memtrain.planning.fit.holding.circumstances import Circumstances
from lightning_memtrain.planning.fit.plan import Plan

# Of batches of very different shapes; the oldest is forgotten.
_MOST_KNOWN = 16


class KnownPlans:
    """What was planned so far, with what it was planned for."""

    def __init__(self) -> None:
        self._known: list[tuple[Circumstances, Plan]] = []

    def __bool__(self) -> bool:
        return bool(self._known)

    def plan_for(self, now: Circumstances, limit_bytes: int, in_force: Plan | None) -> Plan | None:
        """The plan that holds for a batch.

        Args:
            now: the batch.
            limit_bytes: the most that may be used.
            in_force: what is applied, which is preferred.

        Returns:
            The plan; ``None`` if nobody knows whether one does.
        """
        holding = [plan for planned, plan in self._known if _holds(plan, planned, now, limit_bytes)]
        if any(plan is in_force for plan in holding):
            return in_force
        return holding[-1] if holding else None

    def lacks(self, now: Circumstances) -> str:
        """What is new about a batch, for people.

        Args:
            now: the batch.

        Returns:
            A phrase; empty if nothing was planned so far.
        """
        if not self._known:
            return ""
        new = now.beyond(self._known[-1][0])
        return new[0] if new else "more than it was planned for"

    def add(self, now: Circumstances, plan: Plan) -> Plan:
        """Keep a plan.

        Args:
            now: what it was made for.
            plan: the plan.

        Returns:
            The plan.
        """
        self._known = [*self._known[1 - _MOST_KNOWN :], (now, plan)]
        return plan

    def replace(self, plan: Plan, learned: Plan) -> None:
        """Put another plan in the place of one.

        Args:
            plan: one that is known.
            learned: what it has become.
        """
        self._known = [(now, learned if one is plan else one) for now, one in self._known]

    def same(self, plan: Plan) -> Plan:
        """The known plan that equals another one.

        Args:
            plan: as it was read.

        Returns:
            The known one, or ``plan`` itself.
        """
        return next((one for _, one in self._known if one == plan), plan)

    def forget(self) -> None:
        """Have everything planned anew."""
        self._known = []

    def to_list(self) -> list[Any]:
        """Plain values, for a checkpoint."""
        return [{"for": asdict(now), "plan": plan.to_dict()} for now, plan in self._known]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> KnownPlans:
        """The inverse of :meth:`to_list`.

        Args:
            values: what that returned.

        Returns:
            The plans.
        """
        known = cls()
        for value in values:
            planned = dict(value["for"])
            planned["shapes"] = tuple(tuple(shape) for shape in planned["shapes"])
            planned["trained"] = tuple(planned["trained"])
            planned["optimized"] = tuple(planned["optimized"])
            planned["stateful"] = tuple(planned.get("stateful", ()))
            known.add(Circumstances(**planned), Plan.from_dict(value["plan"]))
        return known


def _holds(plan: Plan, planned: Circumstances, now: Circumstances, limit_bytes: int) -> bool:
    if not now.beyond(planned):
        return True
    needed_bytes = None if plan.chosen is None else plan.needed_bytes(plan.chosen)
    if needed_bytes is None:
        return False
    return needed_bytes * now.growth(planned) + now.more_held_bytes(planned) <= limit_bytes
