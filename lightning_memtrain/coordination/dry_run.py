"""Dry runs: a technique runs a step on tensors without data, and nobody who watches steps counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def dry_run() -> Iterator[None]:
    """Run a step that is none: what is in it must not be counted, pooled or logged with real ones.

    Dispatch modes are out of the way inside. Whoever follows steps by other means (hooks of modules, of saved
    tensors) asks :func:`dry_run_depth` and does nothing if it is another than when the watch began, or, as
    the ledger does, asks whether its own mode is on the stack.

    Example:
        >>> with dry_run():
        ...     dry_run_depth()
        1
        >>> dry_run_depth()
        0
    """
    from lightning_memtrain.compat.torch_private import disable_current_modes

    global _depth
    with disable_current_modes():
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def dry_run_depth() -> int:
    """How many dry runs are going on, each within the other; 0 in a real step."""
    return _depth
