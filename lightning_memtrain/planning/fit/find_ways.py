"""Where ways are found: the one door to the search, for plans and for runs."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_memtrain.planning.fit.way import FoundWays


def find_ways(model: Any, batch: Any = None, **options: Any) -> FoundWays:
    """Find what keeps a limit, see :class:`.Search`.

    Args:
        model: what is trained.
        batch: one batch, if there is one.
        **options: further arguments of :class:`.Search`.

    Returns:
        The ways.
    """
    search: Any = importlib.import_module("lightning_memtrain.planning.fit.search").search
    found: FoundWays = search(model, batch, **options)
    return found
