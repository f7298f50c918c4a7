"""From a step without data to what is recomputed: within a limit in the least time, or at the knee."""

from __future__ import annotations

from lightning_memtrain.checkpointing.existing_checkpoints import ExistingCheckpoints
from lightning_memtrain.checkpointing.policies import Groups, Recomputed
from lightning_memtrain.checkpointing.selection.call_profiler import CallProfiler
from lightning_memtrain.checkpointing.selection.counted_step import (
    call_seconds,
    count_step,
    predicted_peak_bytes,
)
from lightning_memtrain.checkpointing.selection.pareto_schedules import fitting, knee, pareto
from lightning_memtrain.checkpointing.selection.recomputation_plan import RecomputationPlan, out_of_reach
from lightning_memtrain.checkpointing.selection.step_chain import CheckpointSchedule
from lightning_memtrain.checkpointing.selection.step_profile import StepProfile
from lightning_memtrain.core import MemoryBreakdown
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.tracing.step.fake_step import FakeStep

# Backward takes about twice as long as forward: two matrix products for each one.
_STEP_OVER_FORWARD = 3
# So many choices are run around the one that the curve says.
_MOST_TRIALS = 12
# So many draws are tried of a step that depends on random numbers.
_DRAWS = 16


class StepCurve:
    """What a step can be made to hold, and for how much time.

    The curve comes from one step without recomputation. It is near the truth, not exact (what an operator's
    output shares with others, temporaries within a segment), so what is chosen is run on fake tensors, too;
    the next cheaper and dearer choices decide where the curve is off.

    Args:
        step: the step.
        times: how long operators take.
        workspace: what operators hold while they run, if that is to count.
    """

    def __init__(self, step: FakeStep, times: OpTimes, workspace: OpWorkspace | None = None) -> None:
        self._step = step
        self._workspace = workspace
        own = step.prepare(lambda: ExistingCheckpoints(step.model))
        if workspace is not None and step.depends_on_random_numbers:  # a limit is for every draw
            step.use_fullest_draw(_DRAWS)
        with step.watched(workspace) as ledger, CallProfiler(step.model, ledger, own.names) as watch:
            step.run()
        profile = StepProfile(watch, ledger.records, times, call_seconds())
        self.plain = ledger.breakdown(timeline=False)
        """The bytes of the step without recomputation."""
        self.plain_peak_bytes = (
            self.plain.peak_bytes if workspace is None else predicted_peak_bytes(ledger, [])
        )
        """Its peak, with workspace if that counts."""
        self.step_seconds = _STEP_OVER_FORWARD * profile.forward_seconds
        """Time of the step without recomputation."""
        self.schedules = pareto(profile.chain())
        """By falling peak and rising time."""

    def _counted(self, groups: Groups) -> tuple[MemoryBreakdown, int]:
        ledger = count_step(self._step, groups, self._workspace)
        if self._workspace is None:
            breakdown = ledger.breakdown(timeline=False)
            return breakdown, breakdown.peak_bytes
        return ledger.breakdown(timeline=False), predicted_peak_bytes(ledger, groups)

    def knee(self) -> RecomputationPlan:
        """The choice after which more time buys little memory."""
        return self._run(knee(self.schedules, self.step_seconds) if self.step_seconds else self.schedules[-1])

    def fitting(self, limit_bytes: int) -> RecomputationPlan:
        """The choice that takes the least time within a limit.

        Args:
            limit_bytes: most bytes that the step may hold.

        Returns:
            The choice, with its bytes counted.

        Raises:
            BudgetOutOfReach: if no choice is within the limit.
        """
        last = len(self.schedules) - 1
        # The curve knows of no workspace.
        cheapest = fitting(self.schedules, limit_bytes - (self.plain_peak_bytes - self.plain.peak_bytes))
        place = last if cheapest is None else self.schedules.index(cheapest)
        best, num_trials = self._run(self.schedules[place]), 1
        while not best.fits(limit_bytes) and place < last and num_trials < _MOST_TRIALS:
            place += 1
            best, num_trials = self._run(self.schedules[place]), num_trials + 1
        if not best.fits(limit_bytes):
            lowest = min(best, self._run(self.schedules[last]), key=lambda one: one.peak_bytes)
            if not lowest.fits(limit_bytes):
                raise out_of_reach(limit_bytes, lowest)
            return lowest
        # What the curve puts above the limit may fit after all, in less time.
        while place > 0 and num_trials < _MOST_TRIALS:
            place -= 1
            cheaper, num_trials = self._run(self.schedules[place]), num_trials + 1
            if not cheaper.fits(limit_bytes):
                break
            best = cheaper
        return best

    def _run(self, schedule: CheckpointSchedule) -> RecomputationPlan:
        groups = [[Recomputed(name) for name in names] for names in schedule.segments]
        breakdown, peak_bytes = self._counted(groups) if groups else (self.plain, self.plain_peak_bytes)
        return RecomputationPlan(
            groups, breakdown, peak_bytes, self.plain_peak_bytes, schedule.seconds, self.step_seconds
        )
