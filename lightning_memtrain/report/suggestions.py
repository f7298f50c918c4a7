"""What would have needed less: asked of whoever can find it out, since a report predicts nothing itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_memtrain.core import ReportWarning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Of a trainer and its module, the bytes that it held at most, and whether that was too much: lines to say.
#: None if that takes longer than the seconds that are given last.
Source = Callable[["Trainer", "LightningModule", int, bool, float], tuple[str, ...]]

# Of the time that a run took; asking is not to be noticed.
_SHARE = 0.1
# Who ran out of memory waits for nothing else.
_SECONDS_AFTER_FAILURE = 60.0

_source: Source | None = None


def use(source: Source | None) -> None:
    """Say who is asked.

    Args:
        source: the one; ``None`` for nobody.
    """
    global _source
    _source = source


class Suggestions:
    """Asks once at the end of a fit, if that takes little of the run's time."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def ask(
        self, trainer: Trainer, model: LightningModule, peak_bytes: int, ran_out: bool
    ) -> tuple[str, ...]:
        """Ask for lines to paste.

        Args:
            trainer: the trainer that has fitted.
            model: its module.
            peak_bytes: what was held at most.
            ran_out: whether that was too much.

        Returns:
            The lines; none if nobody is there to be asked, or it would take too long.
        """
        if _source is None or trainer.world_size > 1:
            return ()
        seconds = _SHARE * (time.monotonic() - self._begun)
        if ran_out:
            seconds = max(seconds, _SECONDS_AFTER_FAILURE)
        try:
            return _source(trainer, model, peak_bytes, ran_out, seconds)
        except Exception as error:  # neither the run nor its report may end by this
            warnings.warn(
                f"`MemoryProfiler` could not find out what would need less: {type(error).__name__}: {error}",
                ReportWarning,
                stacklevel=2,
            )
            return ()
