"""Dry runs: a technique runs a step on tensors without data, and nobody who watches steps counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_depth = 0


@contextmanager
def dry_run() -> Iterator[None]:
    """Run a step that is none: what is in it must not be counted, pooled or logged with real ones.

    Dispatch modes are out of the way inside, but for those that a device needs (``is_of_device``). Whoever
    follows steps by other means (hooks of modules, of saved tensors) asks :func:`dry_run_depth` and does
    nothing if it is another than when the watch began, or, as the ledger does, asks whether its own mode is
    on the stack.

    Example:
        >>> with dry_run():
        ...     dry_run_depth()
        1
        >>> dry_run_depth()
        0
    """
    from lightning_memtrain.compat.torch_private import (
        disable_current_modes,
        get_current_dispatch_mode_stack,
    )

    global _depth
    of_device = [mode for mode in get_current_dispatch_mode_stack() if getattr(mode, "is_of_device", False)]
    with disable_current_modes(), ExitStack() as modes:
        for mode in of_device:
            modes.enter_context(mode)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def dry_run_depth() -> int:
    """How many dry runs are going on, each within the other; 0 in a real step."""
    return _depth
