"""Averages of gradients over ranks that somebody makes by themselves, when another one says so."""

from __future__ import annotations

from collections.abc import Callable

_averaging: dict[object, Callable[[], None]] = {}


def on_gradient_sync(average: Callable[[], None]) -> Callable[[], None]:
    """Be asked to average gradients over ranks whenever that does not happen in the last backward of a step.

    A technique that keeps parameters from ``DistributedDataParallel`` averages their gradients after each
    backward that communicates. If another one lets no backward communicate, and averages when it knows that
    all ranks came through, the first has to do then what the last backward would have had it do.

    Args:
        average: does so, on all ranks alike; the gradients of the step are complete.

    Returns:
        A function that ends it; further calls do nothing.
    """
    key = object()
    _averaging[key] = average

    def undo() -> None:
        _averaging.pop(key, None)

    return undo


def sync_gradients() -> None:
    """Let all average who do so by themselves, in the order in which they asked.

    Called on every rank, in place of the communication of the last backward.

    Example:
        >>> undo = on_gradient_sync(lambda: print("averaged"))
        >>> sync_gradients()
        averaged
        >>> undo()
        >>> sync_gradients()
    """
    for average in tuple(_averaging.values()):
        average()
