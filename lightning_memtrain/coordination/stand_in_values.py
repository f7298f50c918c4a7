"""Made-up values: a technique whose sizes do not depend on values goes on where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def stand_in_values() -> Iterator[None]:
    """Compute with random numbers in the place of those that a tensor without data does not have.

    For code of a technique that chooses by values, but always as many: which weights live, for instance. On
    a device without data, whose operators ask :func:`stands_in`, it then runs as with data; elsewhere this
    changes nothing. Code of users must not run inside.

    Example:
        >>> with stand_in_values():
        ...     stands_in()
        True
        >>> stands_in()
        False
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def stands_in() -> bool:
    """Whether values that nobody knows may be made up."""
    return _depth > 0
