"""The two best ways to need less, for the end of a report."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_memtrain.core import format_bytes
from lightning_memtrain.planning.fit.find_ways import find_ways
from lightning_memtrain.planning.fit.refusals import own_choice, strategy_refusal
from lightning_memtrain.planning.fit.running.agreement import is_planner
from lightning_memtrain.planning.fit.running.device_in_use import device_of
from lightning_memtrain.planning.fit.way import FoundWays, Way

NUM_LINES = 2

# More than this is worth naming for its memory only where nothing else is left.
_LITTLE_TIME = 1.1

_WORTHWHILE = 0.7

# On two cores; a twin of GPT-2 small has 150 modules.
_SECONDS, _SECONDS_PER_MODULE = 2.0, 0.12


def suggest(
    trainer: pl.Trainer, model: pl.LightningModule, peak_bytes: int, ran_out: bool, seconds: float
) -> tuple[str, ...]:
    """Find what would have needed less.

    Args:
        trainer: the trainer that has fitted.
        model: its module.
        peak_bytes: what was held at most.
        ran_out: whether that was too much.
        seconds: how long it may take.

    Returns:
        At most two lines to paste, with bytes and time; none if it would take longer, or was planned already.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(map(is_planner, callbacks)) or own_choice(callbacks) or strategy_refusal(trainer.strategy):
        return ()
    if seconds < _SECONDS + _SECONDS_PER_MODULE * sum(1 for _ in model.modules()):
        return ()
    loader = trainer.train_dataloader
    device = device_of(trainer.strategy.root_device)
    if loader is None or (trainer.strategy.root_device.type not in ("cpu", "cuda")):
        return ()
    # Of a run that went well, so much less that it is worth a change.
    limit_bytes = (peak_bytes if ran_out else int(_WORTHWHILE * peak_bytes)) + device.context_bytes
    found = find_ways(model, None, datamodule=loader, trainer=trainer, device=device, limit_bytes=limit_bytes)
    return tuple(_line(way, found.plain) for way in best_ways(found, peak_bytes if ran_out else None))


def best_ways(found: FoundWays, too_many_bytes: int | None) -> tuple[Way, ...]:
    """The ways of a front that are worth saying.

    Args:
        found: what a search came to.
        too_many_bytes: what a way must stay below; ``None`` for the run as it is.

    Returns:
        The one that saves most for little time, and the one that needs least; after running out of memory the
        two fastest that need less.
    """
    known = [way for way in found.front if way.reserved_bytes is not None and way.time_ratio is not None]
    most_bytes = found.plain.reserved_bytes if too_many_bytes is None else too_many_bytes
    less = [way for way in known if (way.reserved_bytes or 0) < (most_bytes or 0) and not way.is_plain]
    less.sort(key=lambda way: (way.time_ratio or 0, way.reserved_bytes or 0))
    if too_many_bytes is not None:
        return tuple(less[:NUM_LINES])
    quick = [way for way in less if (way.time_ratio or 0) <= _LITTLE_TIME]
    chosen = [min(ways, key=lambda way: way.reserved_bytes or 0) for ways in (quick, less) if ways]
    return tuple(dict.fromkeys(chosen))


def _line(way: Way, plain: Way) -> str:
    percent = round(100 * ((way.time_ratio or 1) - 1))
    change = f"{percent:+d} % time" if percent else "no more time"
    return f"{way}: {format_bytes(way.reserved_bytes or 0)}, {change}"
