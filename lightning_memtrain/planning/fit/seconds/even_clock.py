"""The clock that steps and operators are measured with."""

from __future__ import annotations

import mmap
import time
from collections import deque
from statistics import median
from typing import NamedTuple

import torch

_TOUCHED_BYTES = 2**22
_REMEMBERED = 7


class Moment(NamedTuple):
    """A moment of a process.

    Args:
        seconds: since some other one.
        pages: of memory that the process was given since it began.
    """

    seconds: float
    pages: int


class EvenClock:
    """Tells seconds, without what the system takes to hand out fresh pages of memory.

    Whether an operator's result lies in fresh pages depends on what was allocated and freed before, which is
    not the same for an operator that runs alone, for a few chunks, and for a run that has gone on for long.
    Of results of many MiB it takes longer than many an operator does. So pages are counted, and taken off.

    Args:
        num_threads: of torch. With one thread the time is that of the processor, so that others who use the
            machine do not count.
    """

    def __init__(self, num_threads: int) -> None:
        self._now = time.process_time if num_threads == 1 else time.perf_counter
        self._of_pages: deque[float] = deque(maxlen=_REMEMBERED)
        for _ in range(_REMEMBERED):
            self.calibrate()

    def now(self) -> Moment:
        """This moment."""
        return Moment(self._now(), _pages())

    def between(self, one: Moment, other: Moment) -> float:
        """Seconds between two moments.

        Args:
            one: the earlier.
            other: the later.

        Returns:
            At least 0.
        """
        pages_seconds = (other.pages - one.pages) * median(self._of_pages)
        return max(0.0, other.seconds - one.seconds - pages_seconds)

    def calibrate(self) -> None:
        """Measure what a page takes; the median of the last times counts."""
        with mmap.mmap(-1, _TOUCHED_BYTES) as fresh:
            values = torch.frombuffer(fresh, dtype=torch.uint8)
            moments = [self.now()]
            for _ in range(2):
                values.fill_(1)
                moments.append(self.now())
            del values
        pages, seconds = (
            (moments[1][field] - moments[0][field]) - (moments[2][field] - moments[1][field])
            for field in (1, 0)
        )
        self._of_pages.append(max(0.0, seconds / pages) if pages > 0 else 0.0)


def _pages() -> int:
    """Pages that this process was given without reading them from anywhere."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
