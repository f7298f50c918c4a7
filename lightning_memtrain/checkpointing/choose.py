"""From a step without data to what is recomputed: within a limit in the least time, or at the knee."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.checkpointing.choice import fitting, knee, pareto
from lightning_memtrain.checkpointing.insertion import insert_checkpoints
from lightning_memtrain.checkpointing.items import Choice
from lightning_memtrain.checkpointing.own_checkpoints import OwnCheckpoints
from lightning_memtrain.checkpointing.policies import Groups, Recomputed
from lightning_memtrain.checkpointing.profile import StepProfile, StepWatch
from lightning_memtrain.core import Category, MemoryBreakdown, OutOfReach, format_bytes
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.tracing.fake_step import FakeStep

# Backward takes about twice as long as forward: two matrix products for each one.
_STEP_OVER_FORWARD = 3
# So many choices are run around the one that the curve says.
_MOST_TRIALS = 12
_CALLS_TO_TIME = 30
# So many draws are tried of a step that depends on random numbers.
_DRAWS = 16
# Of random numbers on the CPU, beside those that calls keep.
_STATES_AT_ONCE = 3


class BudgetOutOfReach(OutOfReach, MisconfigurationException):
    """No way to recompute brings the step within a limit, with so many samples at a time."""


@dataclass(frozen=True)
class Chosen:
    """What to recompute, and what comes of it.

    Args:
        groups: what is recomputed together.
        breakdown: the bytes of the step with it, counted on tensors without data.
        peak_bytes: most bytes that the step holds at once, with the workspace of operators if that was asked
            for.
        plain_peak_bytes: the same of the step without.
        seconds: time that recomputing adds to the step.
        step_seconds: time of the step without.
    """

    groups: Groups
    breakdown: MemoryBreakdown
    peak_bytes: int
    plain_peak_bytes: int
    seconds: float
    step_seconds: float

    def fits(self, limit_bytes: int) -> bool:
        """Whether the step holds no more than that."""
        return self.peak_bytes <= limit_bytes

    def __str__(self) -> str:
        count = sum(len(group) for group in self.groups)
        share = self.seconds / self.step_seconds if self.step_seconds else 0.0
        return (
            f"{count} {'module is' if count == 1 else 'modules are'} recomputed: peak "
            f"{format_bytes(self.peak_bytes)} instead of {format_bytes(self.plain_peak_bytes)}, "
            f"about {share:.1%} more time"
        )


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
        own = step.prepare(lambda: OwnCheckpoints(step.model))
        if workspace is not None and step.depends_on_chance:  # a limit is for every draw
            step.take_the_fullest(_DRAWS)
        with step.watched(workspace) as ledger, StepWatch(step.model, ledger, own.names) as watch:
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
        self.choices = pareto(profile.chain())
        """By falling peak and rising time."""

    def _counted(self, groups: Groups) -> tuple[MemoryBreakdown, int]:
        ledger = counted(self._step, groups, self._workspace)
        if self._workspace is None:
            breakdown = ledger.breakdown(timeline=False)
            return breakdown, breakdown.peak_bytes
        return ledger.breakdown(timeline=False), predicted_peak_bytes(ledger, groups)

    def knee(self) -> Chosen:
        """The choice after which more time buys little memory."""
        return self._run(knee(self.choices, self.step_seconds) if self.step_seconds else self.choices[-1])

    def fitting(self, limit_bytes: int) -> Chosen:
        """The choice that takes the least time within a limit.

        Args:
            limit_bytes: most bytes that the step may hold.

        Returns:
            The choice, with its bytes counted.

        Raises:
            BudgetOutOfReach: if no choice is within the limit.
        """
        last = len(self.choices) - 1
        # The curve knows of no workspace.
        cheapest = fitting(self.choices, limit_bytes - (self.plain_peak_bytes - self.plain.peak_bytes))
        place = last if cheapest is None else self.choices.index(cheapest)
        best, num_trials = self._run(self.choices[place]), 1
        while not best.fits(limit_bytes) and place < last and num_trials < _MOST_TRIALS:
            place += 1
            best, num_trials = self._run(self.choices[place]), num_trials + 1
        if not best.fits(limit_bytes):
            lowest = min(best, self._run(self.choices[last]), key=lambda one: one.peak_bytes)
            if not lowest.fits(limit_bytes):
                raise _out_of_reach(limit_bytes, lowest)
            return lowest
        # What the curve puts above the limit may fit after all, in less time.
        while place > 0 and num_trials < _MOST_TRIALS:
            place -= 1
            cheaper, num_trials = self._run(self.choices[place]), num_trials + 1
            if not cheaper.fits(limit_bytes):
                break
            best = cheaper
        return best

    def _run(self, choice: Choice) -> Chosen:
        groups = [[Recomputed(name) for name in names] for names in choice.segments]
        breakdown, peak_bytes = self._counted(groups) if groups else (self.plain, self.plain_peak_bytes)
        return Chosen(groups, breakdown, peak_bytes, self.plain_peak_bytes, choice.seconds, self.step_seconds)


def counted(step: FakeStep, groups: Groups, workspace: OpWorkspace | None = None) -> MemoryLedger:
    """Count a step with checkpoints in its model.

    Args:
        step: the step.
        groups: what is recomputed together.
        workspace: what operators hold while they run, if that is to count.

    Returns:
        The ledger that watched it.
    """
    with step.watched(workspace) as ledger:
        remove = insert_checkpoints(step.model, groups)
        try:
            step.run()
        finally:
            remove()
    return ledger


def predicted_peak_bytes(ledger: MemoryLedger, groups: Groups) -> int:
    """What the allocator will have seen of a step.

    Args:
        ledger: watched the step, with workspace.
        groups: what is recomputed in it.

    Returns:
        The bytes: tensors, workspace of operators, and, on the CPU, states of random numbers, which each call
        that is recomputed may keep, and which are compared and set.
    """
    held = max(ledger.predicted_peak_bytes, ledger.breakdown(per_module=False, timeline=False).peak_bytes)
    if not groups or ledger.device.type != "cpu":
        return held
    return held + (sum(map(len, groups)) + _STATES_AT_ONCE) * torch.get_rng_state().nbytes


def call_seconds() -> float:
    """What recomputing a call takes beside its operators: measured on a module that does next to nothing."""
    module, batch = nn.Identity(), torch.zeros(1, requires_grad=True)

    def fastest() -> float:
        spent = []
        for _ in range(_CALLS_TO_TIME):
            start = time.perf_counter()
            module(batch * batch).sum().backward()
            spent.append(time.perf_counter() - start)
        return min(spent)

    plain = fastest()
    remove = insert_checkpoints(nn.ModuleList([module]), [[Recomputed("0")]])
    try:
        return max(0.0, fastest() - plain)
    finally:
        remove()


_CURES = {
    Category.PARAMETERS: "weights (fewer bits or sparse weights make them smaller)",
    Category.GRADIENTS: "gradients (likewise)",
    Category.OPTIMIZER_STATE: "optimizer state (an optimizer with less state, or with state in 8 bits)",
    Category.ACTIVATIONS: "activations of what is running (microbatches: `Microbatching`)",
    Category.TEMPORARY: "temporary tensors (microbatches: `Microbatching`)",
    Category.INPUTS: "the batch (a smaller one)",
    Category.BUFFERS: "buffers",
    Category.BUCKETS: "buckets of DDP (gradients may lie in them: gradient_as_bucket_view=True)",
}


def _out_of_reach(limit_bytes: int, floor: Chosen) -> BudgetOutOfReach:
    held = sorted(
        ((num, _CURES.get(category, category.value)) for category, num in floor.breakdown.at_peak.items()),
        key=lambda row: -row[0],
    )
    held.append((floor.peak_bytes - floor.breakdown.peak_bytes, "workspace of operators"))
    rows = ", ".join(f"{format_bytes(num)} of {what}" for num, what in held if num > 0)
    return BudgetOutOfReach(
        f"`Budget(limit)` must be at least {format_bytes(floor.peak_bytes)} for this model and batch, the "
        f"lowest peak that recomputing reaches, but got {format_bytes(limit_bytes)}. At that peak there are "
        f"{rows}. Raise the limit, or make one of these smaller."
    )
