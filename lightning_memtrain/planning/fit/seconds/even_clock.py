"""The clock that steps and operators are measured with."""

from __future__ import annotations

import time
from statistics import median

import torch

_TOUCHED_BYTES = 2**24
_RUNS = 3


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
        self._page_seconds = 0.0
        self._page_seconds = median(self._of_a_page() for _ in range(_RUNS))

    def __call__(self) -> float:
        """Seconds since some moment."""
        return self._now() - _pages() * self._page_seconds

    def _of_a_page(self) -> float:
        fresh = torch.empty(_TOUCHED_BYTES, dtype=torch.uint8)
        times, pages = [self._now()], [_pages()]
        for _ in range(2):
            fresh.fill_(1)
            times.append(self._now())
            pages.append(_pages())
        more = (pages[1] - pages[0]) - (pages[2] - pages[1])
        seconds = (times[1] - times[0]) - (times[2] - times[1])
        return max(0.0, seconds / more) if more > 0 else 0.0


def _pages() -> int:
    """Pages that this process was given without reading them from anywhere."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
