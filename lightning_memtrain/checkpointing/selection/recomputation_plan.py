"""What to recompute and what comes of it, counted; or why no way to recompute keeps a limit."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.checkpointing.policies import Groups
from lightning_memtrain.core import Category, MemoryBreakdown, OutOfReach, format_bytes


class BudgetOutOfReach(OutOfReach, MisconfigurationException):
    """No way to recompute brings the step within a limit, with so many samples at a time."""


@dataclass(frozen=True)
class RecomputationPlan:
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


_CURES = {
    Category.PARAMETERS: "weights (fewer bits or sparse weights make them smaller)",
    Category.GRADIENTS: "gradients (likewise)",
    Category.OPTIMIZER_STATE: "optimizer state (an optimizer with less state, or with state in 8 bits)",
    Category.ACTIVATIONS: "activations of what is running (microbatches: `Microbatching`)",
    Category.TEMPORARY: "temporary tensors (microbatches: `Microbatching`)",
    Category.HELD: "what is held beside the step",
    Category.INPUTS: "the batch (a smaller one)",
    Category.BUFFERS: "buffers",
    Category.BUCKETS: "buckets of DDP (gradients may lie in them: gradient_as_bucket_view=True)",
}


def out_of_reach(limit_bytes: int, floor: RecomputationPlan) -> BudgetOutOfReach:
    """The error for a limit that no way to recompute keeps.

    Args:
        limit_bytes: the limit.
        floor: the plan with the lowest peak there is.

    Returns:
        The error; it names what holds the memory at that peak, and what would make it smaller.
    """
    held = sorted(
        ((num, _CURES.get(category, category.value)) for category, num in floor.breakdown.at_peak.items()),
        key=lambda row: -row[0],
    )
    held.append((floor.peak_bytes - floor.breakdown.peak_bytes, "workspace of operators"))
    rows = ", ".join(f"{format_bytes(num)} of {what}" for num, what in held if num > 0)
    return BudgetOutOfReach(
        f"`MemoryBudget(limit)` must be at least {format_bytes(floor.peak_bytes)} for this model and batch, "
        f"the lowest peak that recomputing reaches, but got {format_bytes(limit_bytes)}. At that peak there "
        f"are {rows}. Raise the limit, or make one of these smaller."
    )
