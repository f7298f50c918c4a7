"""Annotations: a technique says what begins, and whoever watches the step hears it."""

from __future__ import annotations

from collections.abc import Callable

_listeners: dict[object, Callable[[str], None]] = {}


def annotate(name: str) -> None:
    """Tell whoever watches the step that something begins; without watchers this costs nothing.

    A :class:`~lightning_memtrain.MemoryLedger` watches while it is entered, so that annotations come onto its
    timeline. An annotation lasts until the next one, or until the optimizer steps.

    Args:
        name: what begins, e.g. ``"microbatch 2 of 4"``. Annotations that count should be written like
            this: the report shortens the name to ``"2/4"`` where there is little room.

    Example:
        >>> heard = []
        >>> undo = watch_annotations(heard.append)
        >>> annotate("microbatch 1 of 2")
        >>> undo()
        >>> annotate("microbatch 2 of 2")
        >>> heard
        ['microbatch 1 of 2']
    """
    if _listeners:
        for listener in tuple(_listeners.values()):
            listener(name)


def is_watched() -> bool:
    """Whether somebody watches the step right now, which takes time of its own.

    Returns:
        Whether any :func:`watch_annotations` has not ended.

    Example:
        >>> is_watched()
        False
        >>> undo = watch_annotations(print)
        >>> is_watched()
        True
        >>> undo()
    """
    return bool(_listeners)


def watch_annotations(listener: Callable[[str], None]) -> Callable[[], None]:
    """Hear every :func:`annotate` of this process from now on.

    Args:
        listener: called with each name, in the thread that annotates.

    Returns:
        A function that ends the watch; further calls do nothing.
    """
    key = object()  # a listener may watch twice, and each watch ends by itself
    _listeners[key] = listener

    def undo() -> None:
        _listeners.pop(key, None)

    return undo
