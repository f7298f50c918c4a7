r"""Which parts of a training step to recompute, chosen from a profile of one step that recomputes nothing.

The forward pass of the step is a chain of stages in the order of time; its backward pass visits them in
reverse. Recomputing a segment :math:`i..k` of the chain frees what its members keep for their own backward
passes, :math:`n_m`, and their inputs except the first one's, :math:`b_m`, each once its member has run. From
when the first member has run until the end of its backward pass, :math:`e_i` bytes are kept beside:

.. math:: f_{ik} = \sum_{m=i}^{k} n_m + \sum_{m=i+1}^{k} b_m - e_i

The segment runs again where the backward pass of its last member begins, and holds all of that at once
when it has run. With nothing else recomputed, its live bytes are at most

.. math::

    p_{ik} = \max_{i \le j \le k} \{\, F_j - f_{i,j-1},\;
        S_k - \textstyle\sum_{m=j}^{k} n_m - \sum_{m=j+1}^{k} b_m + e_i + o_j,\; B_j + e_i \,\}

where the step without recomputation has the peaks :math:`F` in forward and :math:`B` in backward, :math:`S`
bytes at the start of backward, and :math:`o` bytes at most that a forward pass bears and holds at once
(:math:`f_{i,i-1} = 0`). A kept stage peaks at :math:`\max(F_i, B_i)` and frees nothing.

What is freed before a stage is missing from all of its peaks. So a segment in front of a rest of the chain
that peaks at :math:`p` makes it :math:`\max(p_{ik}, p - f_{ik})`, and how much the rest frees matters to
nothing before it: a dynamic programme from the end of the chain to its start has to keep two numbers per
way to choose, peak and seconds. At the start of the chain they are the whole curve.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from operator import neg
from typing import Any

from lightning_memtrain.checkpointing.selection.step_chain import (
    ChainStage,
    CheckpointSchedule,
    all_stages,
    simulate,
)
from lightning_memtrain.core import ArgumentError

# So many pairs of a segment and a way to go on behind it are looked at, at most, in a second or two. It is
# what chains of about 100 stages need if all of their bytes differ.
_MOST_PAIRS = 16_000_000
_LEAST_WIDTH = 128
# Longer chains have segments of up to twice the square root of their length: what still longer ones would
# save beside that is one boundary.
_LONGEST_FREE_CHAIN = 128
# Of so many modules that are called several times, all subsets are tried.
_MOST_SUBSETS_OF = 3

_Segment = tuple[int, int, float, tuple[str, ...]]  # peak and freed bytes by itself, seconds, names


def pareto(chain: Sequence[ChainStage]) -> tuple[CheckpointSchedule, ...]:
    """Find the choices that no other one beats in both peak and seconds.

    Up to about 100 stages they are exact. In longer chains segments have a greatest length, and ways that
    differ little from others are left out: every choice is a real one, but a slightly faster one may exist.

    Args:
        chain: the step without recomputation.

    Returns:
        Choices by falling peak and rising seconds; the first one recomputes nothing.
    """
    curve = [simulate(chain, ())]
    front = _Search(chain).before(tuple(chain), _Front([0.0], [0], [()]), frozenset())
    for seconds, peak, chosen in zip(front.seconds, front.peaks, front.chosen, strict=True):
        segments: dict[tuple[str, ...], None] = {}  # each once, since a name stands for all of its calls
        while chosen:
            names, chosen = chosen
            segments[names] = None
        if peak < curve[-1].peak_bytes:
            curve.append(CheckpointSchedule(peak, seconds, tuple(segments)))
    return tuple(curve)


def fitting(curve: Sequence[CheckpointSchedule], limit_bytes: int) -> CheckpointSchedule | None:
    """Find the choice that takes the least time within a memory.

    Args:
        curve: choices by rising seconds.
        limit_bytes: most live bytes that the step may have.

    Returns:
        The choice, or ``None`` if none fits.
    """
    return next((choice for choice in curve if choice.peak_bytes <= limit_bytes), None)


def knee(curve: Sequence[CheckpointSchedule], step_seconds: float) -> CheckpointSchedule:
    """Find the choice after which more time buys little memory: the least product of peak and step time.

    Args:
        curve: choices by rising seconds; of equally good ones the first is taken.
        step_seconds: time of the step without recomputation, above 0.

    Returns:
        The choice.

    Raises:
        ArgumentError: if there is no choice, or the step takes no time.
    """
    if not curve:
        raise ArgumentError(
            "`knee(curve)` must have at least one choice, but has none. Pass what pareto() gives."
        )
    if not 0 < step_seconds < math.inf:
        raise ArgumentError(
            f"`knee(step_seconds)` must be a time above 0, but got step_seconds={step_seconds!r}. "
            "Pass the measured time of a step that recomputes nothing."
        )
    return min(curve, key=lambda choice: choice.peak_bytes * (step_seconds + choice.seconds))


@dataclass(frozen=True)
class _Front:
    """Ways to go on from a place in the chain to its end, none of them beaten by another one.

    Of each way there are the seconds, which rise, the peak bytes, which fall, and what is recomputed, as
    (names, (names, ... ())). Three lists, since numbers in lists cost the garbage collector nothing.
    """

    seconds: list[float]
    peaks: list[int]
    chosen: list[Any]


# Peak and freed bytes by themselves, seconds and names, if any, of what lies before a front.
_Way = tuple[int, int, float, "tuple[str, ...] | None", _Front]


class _Search:
    """The dynamic programme.

    ``shared`` are the modules with several calls that are recomputed, at each of them. Neither others of that
    kind nor stages that have a shared one within can be; a front is empty if that leaves no way.
    """

    def __init__(self, chain: Sequence[ChainStage]) -> None:
        self._calls = Counter(stage.name for _, stage in all_stages(chain))
        self._width = max(_LEAST_WIDTH, _MOST_PAIRS // max(1, self._count(tuple(chain))))

    def before(self, chain: tuple[ChainStage, ...], after: _Front, shared: frozenset[str]) -> _Front:
        """Extend the front behind a chain to the one in front of it."""
        settings = self._settings(chain, shared)
        return self._best([(0, 0, 0.0, None, self._sweep(chain, after, names)) for names in settings])

    def _sweep(self, chain: tuple[ChainStage, ...], after: _Front, shared: frozenset[str]) -> _Front:
        fronts = [after]  # fronts[-length] lies behind a segment of that length
        for first in reversed(range(len(chain))):
            stage = chain[first]
            ways: list[_Way] = []
            if stage.name in shared:
                pass  # must not be kept
            elif stage.parts:
                ways.append((0, 0, 0.0, None, self.before(stage.parts, fronts[-1], shared)))
            else:
                peak = max(stage.forward_peak_bytes, stage.backward_peak_bytes)
                ways.append((peak, 0, 0.0, None, fronts[-1]))
            for segment in self._segments(chain, first, shared):
                ways.append((*segment, fronts[-len(segment[-1])]))
            fronts.append(self._best(ways))
        return fronts[-1]

    def _segments(
        self, chain: tuple[ChainStage, ...], first: int, shared: frozenset[str]
    ) -> Iterator[_Segment]:
        """Segments that begin with a stage, by length."""
        longest = len(chain) if len(chain) <= _LONGEST_FREE_CHAIN else 2 * math.isqrt(len(chain))
        peak = freed = internal = boundary = born = 0
        seconds = tail = 0.0
        opening = chain[first].opening_bytes
        names: tuple[str, ...] = ()
        for stage in chain[first : first + longest]:
            is_shared = self._calls[stage.name] > 1
            if stage.name is None or (is_shared and (names or stage.name not in shared)):
                return
            if shared and any(part.name in shared for _, part in all_stages(stage.parts)):
                return
            boundary += stage.boundary_bytes if names else 0
            born = max(born, internal + boundary + stage.own_peak_bytes)
            peak = max(peak, stage.forward_peak_bytes - freed, stage.backward_peak_bytes + opening)
            internal += stage.internal_bytes
            freed = internal + boundary - opening
            seconds += tail + stage.seconds
            tail = stage.tail_seconds
            names = (*names, stage.name)
            yield max(peak, stage.backward_start_bytes - freed + born), freed, seconds, names
            if is_shared:
                return

    def _settings(self, chain: tuple[ChainStage, ...], shared: frozenset[str]) -> list[frozenset[str]]:
        """Ways to add to ``shared``, at the innermost chain that has all calls of a module.

        With many such modules: none, or all that lie in equally many others of them.
        """
        stages = dict(all_stages(chain))
        calls = Counter(stage.name for stage in stages.values())
        inner = [Counter(part.name for _, part in all_stages(stage.parts)) for stage in chain]
        here = [
            name
            for name, num in calls.items()
            if name is not None and 1 < num == self._calls[name] and all(some[name] < num for some in inner)
        ]
        if len(here) <= _MOST_SUBSETS_OF:
            added = [some for num in range(len(here) + 1) for some in combinations(here, num)]
        else:
            levels = dict.fromkeys(here, 0)
            for path, stage in stages.items():
                if stage.name in levels:
                    above = sum(stages[path[:depth]].name in levels for depth in range(1, len(path)))
                    levels[stage.name] = max(levels[stage.name], above)
            added = [()]
            added += [tuple(name for name in here if levels[name] == level) for level in {*levels.values()}]
        return [shared.union(some) for some in added]

    def _count(self, chain: tuple[ChainStage, ...]) -> int:
        own = sum(1 for first in range(len(chain)) for _ in self._segments(chain, first, frozenset()))
        return len(chain) + own + sum(self._count(stage.parts) for stage in chain)

    def _best(self, ways: list[_Way]) -> _Front:
        """Ways that no other one beats; of too many, the best one in each of equal spans of seconds."""
        seconds: list[float] = []
        peaks: list[int] = []
        begins = []
        for peak, freed, added, _, front in ways:
            begins.append(len(seconds))
            # The peak falls along the front, down to that of what lies before it; further ways take longer.
            num_higher = bisect_left(front.peaks, -(peak + freed), key=neg)
            seconds += [spent + added for spent in front.seconds[: num_higher + 1]]
            peaks += [rest - freed for rest in front.peaks[:num_higher]]
            peaks += [peak] * (len(seconds) - len(peaks))
        kept: list[int] = []
        for index in sorted(range(len(seconds)), key=seconds.__getitem__):
            if not kept or peaks[index] < peaks[kept[-1]]:
                if kept and seconds[index] == seconds[kept[-1]]:
                    kept.pop()
                kept.append(index)
        if len(kept) > self._width:
            kept = _thinned(kept, seconds, peaks, self._width)
        chosen = []
        for index in kept:
            way = bisect_right(begins, index) - 1
            names, front = ways[way][-2:]
            rest = front.chosen[index - begins[way]]
            chosen.append(rest if names is None else (names, rest))
        return _Front([seconds[index] for index in kept], [peaks[index] for index in kept], chosen)


def _thinned(kept: list[int], seconds: list[float], peaks: list[int], width: int) -> list[int]:
    """The ends, and between them the ways that lie lowest below the line from one to the other."""
    start, most = seconds[kept[0]], peaks[kept[0]]
    duration, fall = seconds[kept[-1]] - start, most - peaks[kept[-1]]

    def span(index: int) -> int:
        return int((seconds[index] - start) / duration * (width - 2))

    def height(index: int) -> float:
        return (seconds[index] - start) / duration - (most - peaks[index]) / fall

    inner = [min(indices, key=height) for _, indices in groupby(kept[1:-1], span)]
    return [kept[0], *inner, kept[-1]]
