"""What of the machine matters for times."""

from __future__ import annotations

import os


def num_cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """How many processes wanted a CPU in the mean of the last minute; ``None`` if that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
