"""What would have needed less: asked of whoever can find it out, since a report predicts nothing itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_memtrain.core import ReportWarning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Of a trainer and its module, and of the bytes that were too many (``None`` if all went well): lines to say.
#: None if that takes longer than the seconds that are given last.
Source = Callable[["Trainer", "LightningModule", "int | None", float], tuple[str, ...]]

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

    def ask(self, trainer: Trainer, model: LightningModule, too_many_bytes: int | None) -> tuple[str, ...]:
        """Ask for lines to paste.

        Args:
            trainer: the trainer that has fitted.
            model: its module.
            too_many_bytes: what was held when memory ran out; ``None`` if it did not.

        Returns:
            The lines; none if nobody is there to be asked, or it would take too long.
        """
        if _source is None or trainer.world_size > 1:
            return ()
        seconds = _SHARE * (time.monotonic() - self._begun)
        if too_many_bytes is not None:
            seconds = max(seconds, _SECONDS_AFTER_FAILURE)
        try:
            return _source(trainer, model, too_many_bytes, seconds)
        except Exception as error:  # neither the run nor its report may end by this
            warnings.warn(
                f"`MemoryProfiler` could not find out what would need less: {type(error).__name__}: {error}",
                ReportWarning,
                stacklevel=2,
            )
            return ()
