"""Recovering: whoever runs out of memory now is taken back and tried again with less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def recovering(can: bool = True) -> Iterator[None]:
    """Say that running out of memory is caught within, and answered by doing with less.

    A device that is only modelled lends more than it has, so that all that a step needs can be told. Within
    this block it runs out of memory as the real one would, since otherwise nobody would take less.

    Args:
        can: whether there is less to do with.

    Example:
        >>> with recovering():
        ...     recovers()
        True
        >>> recovers()
        False
    """
    global _depth
    _depth += can
    try:
        yield
    finally:
        _depth -= can


def recovers() -> bool:
    """Whether running out of memory would be answered by doing with less."""
    return _depth > 0
