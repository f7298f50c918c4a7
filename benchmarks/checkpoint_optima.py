"""The best choices of what to recompute: an integer programme, and dynamic programmes over memory slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lightning_memtrain.checkpointing.selection.step_chain import ChainStage, CheckpointSchedule, simulate

UNREACHABLE = 2**30  # in seconds


@dataclass(frozen=True)
class Stage:
    """A stage of a chain in the words of Beaumont et al.; its gradient is as large as its output.

    Args:
        output: the output.
        saved: what backward needs, the output among it.
        forward_temporary: beside that in forward.
        backward_temporary: beside that and the gradients of input and output in backward.
        seconds: time of forward, a whole number in whatever unit.
    """

    output: int
    saved: int
    forward_temporary: int
    backward_temporary: int
    seconds: int


def integer_optimum(
    items: Sequence[ChainStage], longest: int, limit_bytes: int, seconds: float
) -> tuple[CheckpointSchedule | None, float]:
    """The fastest choice within a limit, and no less than how many seconds any has.

    One variable per segment. Segments do not overlap; what is freed before an item or a segment must cover
    what it would have above the limit by itself.
    """
    spans = [
        (first, stop)
        for first in range(len(items))
        for stop in range(first + 1, min(len(items), first + longest) + 1)
        if all(item.name is not None for item in items[first:stop])
    ]
    peaks, freed, times = [], [], []
    for first, stop in spans:
        part = items[first:stop]
        peaks.append(simulate(part, [[str(item.name) for item in part]]).peak_bytes)
        freed.append(sum(one.internal_bytes for one in part) + sum(one.boundary_bytes for one in part[1:]))
        times.append(sum(one.seconds for one in part))
    firsts, stops = np.array(spans).T
    place = np.arange(len(items))[:, None]
    covers = ((firsts <= place) & (place < stops)).astype(float)
    gone = (stops <= place) * np.array(freed)
    # Of an item itself: max(F, B) <= limit + gone, unless a segment covers it; then the segment's own peak.
    alone = np.array([max(item.forward_peak_bytes, item.backward_peak_bytes) for item in items], dtype=float)
    begins = (firsts == place) * np.array(peaks, dtype=float)
    inside = covers * alone[:, None]  # an item in a segment asks for nothing by itself
    rows = np.vstack([covers, (-gone - inside) / limit_bytes, (begins - gone) / limit_bytes])
    upper = np.concatenate([np.ones(len(items)), (limit_bytes - alone) / limit_bytes, np.ones(len(items))])
    found = milp(
        np.array(times),
        constraints=LinearConstraint(rows, ub=upper),
        integrality=np.ones(len(spans)),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None, 0.0
    chosen = [
        [str(item.name) for item in items[first:stop]]
        for (first, stop), is_chosen in zip(spans, found.x, strict=True)
        if is_chosen > 0.5
    ]
    return simulate(items, chosen), float(found.mip_dual_bound)


class Slots:
    """Least seconds of forward runs, by how many slots of memory there are for a part of a chain.

    As in the paper, the input of a part is not counted, and the gradient of its last output is.

    Args:
        stages: the chain, with sizes in slots.
        num_slots: the most memory.
    """

    def __init__(self, stages: Sequence[Stage], num_slots: int) -> None:
        self.stages = stages
        self.num_slots = num_slots
        self.outputs = [0, *(stage.output for stage in stages)]  # outputs[i] is the input of stage i
        self.gradients = [0, *(stage.output for stage in stages[:-1]), 0]
        self.until = [0, *itertools.accumulate(stage.seconds for stage in stages)]

    def shifted(self, times: np.ndarray, held: int) -> np.ndarray:
        """Times with so many slots fewer."""
        moved = np.full_like(times, UNREACHABLE)
        moved[held:] = times[: len(times) - held]
        return moved

    def keeping(self, first: int, last: int) -> int:
        """Slots to run stage ``first`` forward and backward, the part's gradient being that of ``last``."""
        stage = self.stages[first]
        forward = self.gradients[last + 1] + stage.saved + stage.forward_temporary
        gradients = self.gradients[first] + self.gradients[first + 1]
        return max(forward, gradients + stage.saved + stage.backward_temporary)

    def passing(self, first: int, last: int) -> int:
        """Slots to run a part forward and keep its input only."""
        runs = [self.outputs[first + 1] + self.stages[first].forward_temporary]
        runs += [
            self.outputs[i] + self.outputs[i + 1] + self.stages[i].forward_temporary
            for i in range(first + 1, last)
        ]
        return self.gradients[last + 1] + max(runs)

    def flat(self) -> np.ndarray:
        """Each stage is kept, or runs again in a segment that then keeps all: the choices of `pareto`."""
        num = len(self.stages)
        best = [np.zeros(self.num_slots + 1)]
        for first in reversed(range(num)):
            stage = self.stages[first]
            kept = stage.seconds + self.shifted(best[-1], stage.saved)
            kept[: self.keeping(first, num - 1)] = UNREACHABLE
            for last in range(first, num - 1):
                held = list(itertools.accumulate((one.saved for one in self.stages[first:last]), initial=0))
                slots = max(
                    before + self.keeping(i, last)
                    for i, before in zip(range(first, last + 1), held, strict=True)
                )
                again = 2 * (self.until[last + 1] - self.until[first])
                segment = again + self.shifted(best[first - last - 1], self.outputs[last + 1])
                segment[: max(slots, self.passing(first, last))] = UNREACHABLE
                np.minimum(kept, segment, out=kept)
            best.append(kept)
        return best[-1]

    def nested(self) -> np.ndarray:
        """Theorem 1 of the paper.

        A part keeps all of its first stage (``F_all``), or only its input (``F_ck``) up to some stage behind,
        from where the rest runs first; then what was passed over is a part of its own.
        """
        num = len(self.stages)
        table = np.full((num, num, self.num_slots + 1), UNREACHABLE, dtype=np.int32)
        behind = np.full_like(table, UNREACHABLE)  # behind[i, t]: part i..t while the input of i is kept, too
        for first in reversed(range(num)):
            stage = self.stages[first]
            for last in range(first, num):
                if first == last:
                    best = np.full(self.num_slots + 1, stage.seconds, dtype=np.int32)
                else:
                    best = stage.seconds + self.shifted(table[first + 1, last], stage.saved)
                best[: self.keeping(first, last)] = UNREACHABLE
                if first < last:
                    passed = np.array(self.until[first + 1 : last + 1], dtype=np.int32) - self.until[first]
                    splits = behind[first + 1 : last + 1, last] + table[first, first:last]
                    split = (splits + passed[:, None]).min(axis=0)
                    split[: self.passing(first, last)] = UNREACHABLE
                    best = np.minimum(best, split)
                table[first, last] = np.minimum(best, UNREACHABLE // 4)
                behind[first, last] = np.minimum(
                    self.shifted(table[first, last], self.outputs[first]), UNREACHABLE // 4
                )
        return table[0, num - 1]


def least_slots(times: np.ndarray) -> int:
    return int(np.argmax(times < UNREACHABLE // 8))
