"""Watches those steps of an optimizer that could not be foretold, and breaks them off before a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_memtrain.ledger import AllocationLimit, LimitReached, MemoryLedger, ResultBytes
from lightning_memtrain.microbatching.refusals import update_refused

# The first step makes state, the second is the first that has it.
_NUM_WATCHED = 2


class UpdateGuard:
    """Lets an optimizer of which nothing is known step within a limit, and learns what it holds.

    Args:
        trainer: the trainer that fits.
        model: its module.
    """

    def __init__(self, trainer: Trainer, model: LightningModule) -> None:
        self._trainer = trainer
        self._model = model
        self._num_watched: dict[str, int] = {}
        self._over_bytes: dict[str, int] = {}
        self._ledger: MemoryLedger | None = None
        self._signature = ""

    def over_bytes(self, signature: str) -> int:
        """What steps of an optimizer have held at most beyond what there was before them.

        Args:
            signature: see :func:`~.update.update_signature`.

        Returns:
            The bytes; 0 if none was watched.
        """
        return self._over_bytes.get(signature, 0)

    def begin(self, signature: str, batch: Any, limit_bytes: int) -> None:
        """Watch the step that begins now, unless enough of its kind have been watched.

        Args:
            signature: of the optimizer.
            batch: the batch, which is still held.
            limit_bytes: bytes that may be used in all.
        """
        if self._ledger is not None or self._num_watched.get(signature, 0) >= _NUM_WATCHED:
            return
        device = self._trainer.strategy.root_device
        limit = _UpdateLimit(limit_bytes, ResultBytes(device), self._refusal)
        ledger = MemoryLedger(self._model, self._trainer.optimizers, batch, device=device, limit=limit)
        self._ledger, self._signature = ledger.__enter__(), signature

    def end(self) -> None:
        """The step is over, or has failed."""
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            return
        ledger.__exit__(None, None, None)
        held = ledger.breakdown(per_module=False, timeline=False)
        over_bytes = held.ledger_peak_bytes - held.start_bytes
        self._over_bytes[self._signature] = max(over_bytes, self.over_bytes(self._signature))
        self._num_watched[self._signature] = self._num_watched.get(self._signature, 0) + 1

    def _refusal(self, error: LimitReached) -> Exception:
        ledger = self._ledger
        assert ledger is not None
        now = ledger.held_between(ledger.tick, ledger.tick)
        return update_refused(error.limit_bytes, error.needed_bytes, now, 0, 0, at_least=True)


class _UpdateLimit(AllocationLimit):
    """Ends the run in words of its own.

    Args:
        limit_bytes: most bytes that may be live.
        results: says what operators make.
        refusal: what to raise instead.
    """

    def __init__(
        self, limit_bytes: int, results: ResultBytes, refusal: Callable[[LimitReached], Exception]
    ) -> None:
        super().__init__(limit_bytes, results)
        self._refusal = refusal

    def before(
        self, func: Callable[..., Any], args: Any, kwargs: Any, live_bytes: int, late_bytes: int
    ) -> None:
        """As in the base class."""
        try:
            super().before(func, args, kwargs, live_bytes, late_bytes)
        except LimitReached as error:
            raise self._refusal(error) from None
