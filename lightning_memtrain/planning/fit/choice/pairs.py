r"""Microbatch size and recomputation, chosen together.

A batch of :math:`N` samples runs as :math:`k` chunks of :math:`m = \lceil N / k \rceil`. Of each :math:`k`
there is a curve: what its chunks hold at the peak, and how long recomputing takes in each of them. A step of
:math:`k` chunks with the recomputation :math:`r` then takes

.. math:: T(k, r) = k \, t(m) + k \, a(m, r) + u

with the chunk's time :math:`t`, what recomputation adds to it, :math:`a`, and the update, :math:`u`. Smaller
chunks need less recomputation for the same limit, but use the device worse, so that the best pair is rarely
at one of the ends. All pairs are looked at: the curves are the exact Pareto fronts of their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_memtrain.checkpointing.selection.step_chain import CheckpointSchedule


@dataclass(frozen=True)
class SizeCurve:
    """All that a batch can be made to hold with one number of chunks.

    Args:
        num_chunks: at least 1.
        size: samples of the largest chunk.
        seconds: of the step, without recomputation.
        schedules: what can be recomputed in each chunk, by falling peak and rising seconds.
        more_bytes: what the step holds beside what the schedules count, such as workspace.
        for_recomputed: seconds of the step for each second that its chunks' schedules say.
    """

    num_chunks: int
    size: int
    seconds: float
    schedules: Sequence[CheckpointSchedule]
    more_bytes: int = 0
    for_recomputed: float | None = None

    def pairs(self) -> list[Pair]:
        """One per schedule."""
        each = self.num_chunks if self.for_recomputed is None else self.for_recomputed
        return [
            Pair(
                self.num_chunks,
                self.size,
                one.segments,
                one.peak_bytes + self.more_bytes,
                self.seconds + each * one.seconds,
            )
            for one in self.schedules
        ]


@dataclass(frozen=True)
class Pair:
    """A number of chunks, with what is recomputed in each.

    Args:
        num_chunks: of the batch.
        size: samples of the largest.
        segments: names of modules that are recomputed together.
        peak_bytes: most bytes that the step holds.
        seconds: of the step.
    """

    num_chunks: int
    size: int
    segments: tuple[tuple[str, ...], ...]
    peak_bytes: int
    seconds: float


def front(curves: Iterable[SizeCurve]) -> tuple[Pair, ...]:
    """The pairs that no other one beats in both bytes and seconds.

    Args:
        curves: of the numbers of chunks to choose from.

    Returns:
        By rising seconds and falling bytes; of equal ones that with fewer chunks.
    """
    return unbeaten([pair for curve in curves for pair in curve.pairs()])


def unbeaten(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Those that no other one beats in both bytes and seconds.

    Args:
        pairs: any.

    Returns:
        By rising seconds and falling bytes; of equal ones that with fewer chunks.
    """
    best: list[Pair] = []
    for pair in sorted(pairs, key=lambda one: (one.seconds, one.peak_bytes, one.num_chunks)):
        if not best or pair.peak_bytes < best[-1].peak_bytes:
            best.append(pair)
    return tuple(best)


def cheapest(pairs: Sequence[Pair], limit_bytes: int) -> Pair | None:
    """The fastest pair within a limit.

    Args:
        pairs: of :func:`front`.
        limit_bytes: most bytes to hold.

    Returns:
        The pair; ``None`` if none keeps the limit.
    """
    return next((pair for pair in pairs if pair.peak_bytes <= limit_bytes), None)


def chunk_counts(batch_size: int, most: int = 40) -> list[int]:
    """Numbers of chunks that are worth looking at: those that make chunks of different sizes.

    Args:
        batch_size: samples of the batch, at least 1.
        most: how many numbers, about; more than so many are thinned out to even ratios.

    Returns:
        Rising numbers, the first one 1, the last one ``batch_size``.

    Example:
        >>> chunk_counts(10)
        [1, 2, 3, 4, 5, 10]
    """
    counts = []
    count = 1
    while count <= batch_size:
        counts.append(count)
        size = math.ceil(batch_size / count)
        if size == 1:
            break
        count = math.ceil(batch_size / (size - 1))  # the fewest chunks that are smaller
    if len(counts) <= most:
        return counts
    step = math.log(counts[-1]) / (most - 1)
    kept: list[int] = []
    for place, number in enumerate(counts):
        nearest = round(math.log(number) / step)
        following = round(math.log(counts[place + 1]) / step) if place + 1 < len(counts) else -1
        if following != nearest:
            kept.append(number)
    return sorted({1, *kept})
