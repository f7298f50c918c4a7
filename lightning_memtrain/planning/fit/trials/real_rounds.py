"""Ways run for real in turn, round after round, so that what the machine does meanwhile meets all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_memtrain.planning.fit.trials.switched_on import SwitchedOn
from lightning_memtrain.planning.fit.trials.timed_trial import RealSeconds

_ROUNDS = 3
# What Lightning takes to begin a run.
_BEGIN_SECONDS = 0.3
# So long a batch is watched at least, if it has enough chunks.
_WATCHED_SECONDS = 0.3
_LEAST_CHUNKS = 3


@dataclass(frozen=True)
class Candidate:
    """What may be run for real.

    Args:
        num_chunks: of the batch.
        segments: what is recomputed.
        switched: further techniques.
        chunk_seconds: that a chunk takes, about.
    """

    num_chunks: int
    segments: tuple[tuple[str, ...], ...]
    switched: SwitchedOn
    chunk_seconds: float

    @property
    def num_watched(self) -> int:
        """Chunks to run."""
        wanted = math.ceil(_WATCHED_SECONDS / max(self.chunk_seconds, 1e-6))
        return min(self.num_chunks, max(_LEAST_CHUNKS, wanted))

    @property
    def seconds(self) -> float:
        """What it takes to run it once, about."""
        return _BEGIN_SECONDS + (1 + self.num_watched) * self.chunk_seconds


class RealRounds:
    """Runs candidates in turn, as long as there is time.

    Args:
        run: runs one for real, for at most so many seconds.
        most_seconds: for all of them together.
    """

    def __init__(self, run: Callable[[Candidate, float], RealSeconds | None], most_seconds: float) -> None:
        self._run = run
        self._seconds_left = most_seconds

    def time(self, candidates: Sequence[Candidate], between: Callable[[], None]) -> list[RealSeconds | None]:
        """Run the candidates in turn.

        Args:
            candidates: the most wanted first; the last ones are left out if there is not enough time.
            between: called after each round.

        Returns:
            The median of each, ``None`` for one that failed or was left out.
        """
        wanted: list[Candidate] = []
        for one in candidates:
            if sum(other.seconds for other in [*wanted, one]) > self._seconds_left:
                break
            wanted.append(one)
        found: list[list[RealSeconds]] = [[] for _ in wanted]
        for turn in range(_ROUNDS):
            begin = time.perf_counter()
            for seconds, one in zip(found, wanted, strict=True):
                if turn and not seconds:
                    continue  # it failed
                if turn and sum(other.seconds for other in wanted) > self._seconds_left:
                    break
                result = self._run(one, max(1.0, 2 * self._seconds_left))
                if result is not None:
                    seconds.append(result)
            self._seconds_left -= time.perf_counter() - begin
            if any(found):
                between()
        medians: list[RealSeconds | None] = [
            RealSeconds(median(one.chunk for one in seconds), median(one.batch for one in seconds))
            if seconds
            else None
            for seconds in found
        ]
        return medians + [None] * (len(candidates) - len(wanted))
