"""Asides: what runs within a step and is no part of it, such as the trial of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_memtrain.coordination.annotations import annotate

_listeners: dict[object, tuple[Callable[[], None], Callable[[], None]]] = {}
_depth = 0


@contextmanager
def aside(name: str) -> Iterator[None]:
    """Run something that really runs, but whose peak is not the step's.

    Unlike a :func:`~lightning_memtrain.coordination.dry_run` it is counted and shown, under its own name.
    Whoever says what a step holds leaves it out. An aside within another one is a part of that one, with a
    name.

    Args:
        name: what begins, e.g. ``"probe of 4 samples"``; see
            :func:`~lightning_memtrain.coordination.annotate`.

    Example:
        >>> heard = []
        >>> undo = watch_asides(lambda: heard.append("begins"), lambda: heard.append("is over"))
        >>> with aside("probe of 4 samples"):
        ...     heard.append("runs")
        >>> undo()
        >>> heard
        ['begins', 'runs', 'is over']
    """
    global _depth
    listeners = () if _depth else tuple(_listeners.values())
    for begin, _ in listeners:
        begin()
    annotate(name)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        for _, end in reversed(listeners):
            end()


def watch_asides(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
    """Hear of every :func:`aside` of this process from now on.

    Args:
        begin: called before it begins.
        end: called when it is over, also if it failed.

    Returns:
        A function that ends the watch; further calls do nothing.
    """
    key = object()
    _listeners[key] = begin, end

    def undo() -> None:
        _listeners.pop(key, None)

    return undo
