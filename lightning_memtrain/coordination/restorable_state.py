"""State that goes back: a technique may run a batch again, and who gathers things in its passes follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class RestorableState(NamedTuple):
    """What somebody has gathered so far.

    Args:
        tensors: copies that are held for it.
        restore: goes back to it; may be called several times, and needs no memory to speak of.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[[], None]


_registered: dict[object, Callable[[], RestorableState]] = {}


def capture_all() -> list[RestorableState]:
    """Ask all who gather things in forward and backward to keep what they have.

    Called before a batch that may be given up and begun again, such as one that may run out of memory.

    Returns:
        What each has captured.

    Example:
        >>> seen = [1]
        >>> def capture():
        ...     before = list(seen)
        ...     return RestorableState((), lambda: seen.__setitem__(slice(None), before))
        >>> undo = register_restorable(capture)
        >>> captured = capture_all()
        >>> seen.append(2)
        >>> for state in captured:
        ...     state.restore()
        >>> seen
        [1]
        >>> undo()
        >>> capture_all()
        []
    """
    return [capture() for capture in tuple(_registered.values())]


def register_restorable(capture: Callable[[], RestorableState]) -> Callable[[], None]:
    """Be asked by every :func:`capture_all` of this process from now on.

    Args:
        capture: called between passes; says how to come back to that moment.

    Returns:
        A function that ends it; further calls do nothing.
    """
    key = object()
    _registered[key] = capture

    def undo() -> None:
        _registered.pop(key, None)

    return undo
