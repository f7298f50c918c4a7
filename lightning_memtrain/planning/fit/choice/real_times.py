r"""What pairs took when they were run for real, and what that says of those that were not.

Of the seconds that operators take one by one, :math:`t` for a chunk and :math:`a` for what recomputing adds,
a real chunk takes

.. math:: f(m) \, (t(m) + r \, a(m))

with a factor :math:`f` that depends on its size :math:`m`, since much is done beside operators, and caches
and allocator do well or badly by size; and :math:`r`, since what is recomputed finds other caches. Between
the sizes that were run :math:`f` is on a straight line over the logarithm of the size; beyond them it stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

# Recomputation of so much of a step is believed as much as that it takes what its operators do.
_DRAWN = 0.1
# What is recomputed may take so many times its operators' share: less or more is a slip of the clock.
_LEAST, _MOST = 0.5, 3.0


@dataclass(frozen=True)
class TimedPair:
    """A pair that was run for real.

    Args:
        size: samples of the largest chunk.
        plain_seconds: of its operators without recomputation, all chunks.
        more_seconds: of those that recomputing adds.
        seconds: what its chunks took.
        batch_seconds: what the batch took beside its chunks and the update.
    """

    size: int
    plain_seconds: float
    more_seconds: float
    seconds: float
    batch_seconds: float = 0.0


class RealTimes:
    """Corrects seconds of operators by those of real chunks.

    Args:
        timed: what was run, by anything.
    """

    def __init__(self, timed: Iterable[TimedPair] = ()) -> None:
        self._pairs = [one for one in timed if one.plain_seconds > 0]
        self.batch_seconds = median([one.batch_seconds for one in self._pairs] or [0.0])
        """Of each batch, beside its chunks and the update."""
        plain = [one for one in self._pairs if one.more_seconds == 0]
        found: dict[int, list[float]] = {}
        for one in plain or self._pairs:
            found.setdefault(one.size, []).append(one.seconds / (one.plain_seconds + one.more_seconds))
        self._factors = sorted((math.log(size), median(factors)) for size, factors in found.items())
        self.of_recomputation = self._of_recomputation() if plain else 1.0
        """What recomputing takes over what its operators do, beside the factor of the size."""

    def _of_recomputation(self) -> float:
        """The mean over pairs, drawn to 1 where so little is recomputed that the clock would not tell."""
        pairs = [one for one in self._pairs if one.more_seconds > 0]
        drawn = _DRAWN * sum(one.plain_seconds for one in pairs)
        real = sum(one.seconds / self.of_size(one.size) - one.plain_seconds for one in pairs)
        said = sum(one.more_seconds for one in pairs)
        return min(_MOST, max(_LEAST, (real + drawn) / (said + drawn))) if pairs else 1.0

    def of_size(self, size: float) -> float:
        """What a chunk takes over what its operators do.

        Args:
            size: samples of the chunk, at least 1.

        Returns:
            The factor; 1 if nothing was run for real.
        """
        if not self._factors:
            return 1.0
        place = math.log(size)
        if place <= self._factors[0][0]:
            return self._factors[0][1]
        for (low, one), (high, other) in zip(self._factors, self._factors[1:], strict=False):
            if place <= high:
                return one + (other - one) * (place - low) / (high - low)
        return self._factors[-1][1]
