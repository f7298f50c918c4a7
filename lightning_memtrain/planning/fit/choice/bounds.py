"""Which pair to try next, given what trials have shown of the curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_memtrain.planning.fit.choice.pairs import Pair, SizeCurve

# After so many pairs of a curve that need more than the limit its lowest one is asked: the curve is far off.
_MOST_FAILURES = 2
# Between a pair that fits and one that does not, nothing is tried that is nearer than this part of the limit.
_NEAR_ENOUGH = 0.002


class Bounds:
    """What a curve may say of a pair that is worth trying, for each number of chunks.

    A curve is near the truth, not exact. Where a pair needs more than the limit, the next one of its curve
    has to be lower by as much, or is the lowest; where it needs less, the next one may be higher by as much.
    Between one that fits and one that does not, the middle is tried.

    Args:
        limit_bytes: what a pair may need.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bounds: dict[int, float] = {}
        self._fits: dict[int, int] = {}
        self._fails: dict[int, int] = {}
        self._num_fails: dict[int, int] = {}

    def next_pair(self, curves: Sequence[SizeCurve], was_tried: Callable[[Pair], bool]) -> Pair | None:
        """The fastest pair that is worth trying.

        Args:
            curves: of all numbers of chunks.
            was_tried: whether a pair was.

        Returns:
            The pair; ``None`` if there is none.
        """
        return next(iter(self.untried(curves, was_tried)), None)

    def untried(self, curves: Sequence[SizeCurve], was_tried: Callable[[Pair], bool]) -> list[Pair]:
        """The pairs that are worth trying, at most one for each number of chunks.

        Args:
            curves: of all numbers of chunks.
            was_tried: whether a pair was.

        Returns:
            The fastest first.
        """
        found = [self._of(curve, was_tried) for curve in curves]
        pairs = [pair for pair in found if pair is not None]
        return sorted(pairs, key=lambda pair: (pair.seconds, pair.peak_bytes))

    def note(self, pair: Pair, needed_bytes: int) -> None:
        """Take up what a pair needed.

        Args:
            pair: with the bytes that its curve says.
            needed_bytes: what it needed.
        """
        count, said = pair.num_chunks, pair.peak_bytes
        if needed_bytes <= self._limit_bytes:
            self._fits[count] = max(said, self._fits.get(count, 0))
        else:
            self._fails[count] = min(said, self._fails.get(count, said))
            self._num_fails[count] = self._num_fails.get(count, 0) + 1
        fits, fails = self._fits.get(count), self._fails.get(count)
        bound: float = said - (needed_bytes - self._limit_bytes)
        if fits is not None and fails is not None:
            bound = (fits + fails) / 2 if fails - fits > _NEAR_ENOUGH * self._limit_bytes else 0
        elif self._num_fails.get(count, 0) >= _MOST_FAILURES:
            bound = 0
        self._bounds[count] = bound

    def _of(self, curve: SizeCurve, was_tried: Callable[[Pair], bool]) -> Pair | None:
        pairs, count = curve.pairs(), curve.num_chunks
        bound = self._bounds.get(count, self._limit_bytes)
        fitting = next((pair for pair in pairs if pair.peak_bytes <= bound), None)
        if fitting is None and count in self._fails and count not in self._fits:
            fitting = pairs[-1]
        return None if fitting is None or was_tried(fitting) else fitting
