"""Windows: several backwards whose gradients add up before the optimizer steps once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_partial = False


@contextmanager
def partial_backward(partial: bool = True) -> Iterator[None]:
    """Say that more backwards of the same step follow those in this block.

    Whoever splits a batch says it around each part but the last; whoever acts on gradients when they are
    complete asks :func:`backward_is_partial`.

    Args:
        partial: ``False`` for the last part, so that a loop needs no case of its own.

    Example:
        >>> with partial_backward():
        ...     backward_is_partial()
        True
        >>> backward_is_partial()
        False
    """
    global _partial
    before, _partial = _partial, _partial or partial
    try:
        yield
    finally:
        _partial = before


def backward_is_partial() -> bool:
    """Whether the gradients of a backward that runs now are added to by a later one of the same step."""
    return _partial
