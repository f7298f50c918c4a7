"""Snapshots: a technique may run a batch again, and who gathers things in its passes goes back with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """What somebody has gathered so far.

    Args:
        tensors: copies that are held for it.
        restore: goes back to it; may be called several times, and needs no memory to speak of.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[[], None]


_keepers: dict[object, Callable[[], Kept]] = {}


def keep_all() -> list[Kept]:
    """Ask all who gather things in forward and backward to keep what they have.

    Called before a batch that may be given up and begun again, such as one that may run out of memory.

    Returns:
        What each keeps.

    Example:
        >>> seen = [1]
        >>> def keep():
        ...     before = list(seen)
        ...     return Kept((), lambda: seen.__setitem__(slice(None), before))
        >>> undo = on_snapshot(keep)
        >>> kept = keep_all()
        >>> seen.append(2)
        >>> for one in kept:
        ...     one.restore()
        >>> seen
        [1]
        >>> undo()
        >>> keep_all()
        []
    """
    return [keep() for keep in tuple(_keepers.values())]


def on_snapshot(keep: Callable[[], Kept]) -> Callable[[], None]:
    """Be asked by every :func:`keep_all` of this process from now on.

    Args:
        keep: called between passes; says how to come back to that moment.

    Returns:
        A function that ends it; further calls do nothing.
    """
    key = object()
    _keepers[key] = keep

    def undo() -> None:
        _keepers.pop(key, None)

    return undo
