"""Watches those steps of an optimizer that could not be foretold, and breaks them off before a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_memtrain.core import OutOfReach
from lightning_memtrain.ledger import AllocationLimit, LimitReached, MemoryLedger, ResultBytes
from lightning_memtrain.microbatching.automatic_size.limit_errors import update_limit_error
from lightning_memtrain.microbatching.rank_agreement import raise_on_all_ranks
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors

# The first step makes state, the second is the first that has it.
_NUM_WATCHED = 2


class UpdateGuard:
    """Lets an optimizer of which nothing is known step within a limit, and learns what it holds.

    A limit that a rank cannot keep is agreed on before any rank raises. While a step is watched, ranks meet
    when it is over, and before each further evaluation of the model in it; a rank whose step was broken off
    meets the others there. Within an evaluation the limit only says that a chunk does not fit, on which ranks
    agree in any case.

    Args:
        trainer: the trainer that fits.
        model: its module.
    """

    def __init__(self, trainer: Trainer, model: LightningModule) -> None:
        self._trainer = trainer
        self._model = model
        self._unforeseeable: set[str] = set()
        self._num_watched: dict[str, int] = {}
        self._over_bytes: dict[str, int] = {}
        self._held = HeldTensors()
        self._ledger: MemoryLedger | None = None
        self._signature = ""
        self._limit_bytes = 0
        self._refusal: Exception | None = None

    def follow(self, signature: str) -> None:
        """Watch steps of a kind that could not be foretold; on all ranks, since they meet after one.

        Args:
            signature: see :func:`~.update_forecast.update_signature`.
        """
        self._unforeseeable.add(signature)

    def around_step(self, step: Callable[[], None]) -> None:
        """Take a step of the optimizer, which may be one to watch.

        Args:
            step: takes it.

        Raises:
            MisconfigurationException: on all ranks, if one of them cannot keep the limit.
        """
        try:
            step()
        except Exception:
            if self._refusal is None:
                raise
        refusal = self._refusal
        if self._ledger is not None:
            self.end()
            refusal = None if refusal is None else MisconfigurationException(str(refusal))
            raise_on_all_ranks(self._trainer, refusal)

    def before_evaluation(self) -> None:
        """Before an evaluation of the model, which may be one within a step that is watched.

        Raises:
            MisconfigurationException: on all ranks, if a rank's step was broken off since the last one.
        """
        if self._ledger is not None:
            raise_on_all_ranks(self._trainer, None)

    @contextmanager
    def chunks(self) -> Iterator[None]:
        """Around the chunks of an evaluation, which are broken off if they do not fit beside the step."""
        if self._ledger is None:
            yield
            return
        try:
            with self._ledger.limited(self._limit()):
                yield
        finally:
            self._refusal = None

    def _limit(self) -> _UpdateLimit:
        results = ResultBytes(self._trainer.strategy.root_device)
        return _UpdateLimit(self._limit_bytes, results, self._refuse)

    def over_bytes(self, signature: str) -> int:
        """What steps of an optimizer have held at most beyond what there was before them.

        Args:
            signature: see :func:`~.update_forecast.update_signature`.

        Returns:
            The bytes; 0 if none was watched.
        """
        return self._over_bytes.get(signature, 0)

    def begin(self, signature: str, batch: Any, limit_bytes: int) -> None:
        """Watch the step that begins now if it could not be foretold, and few of its kind have been watched.

        Args:
            signature: of the optimizer.
            batch: the batch, which is still held.
            limit_bytes: bytes that may be used in all.
        """
        is_due = signature in self._unforeseeable and self._num_watched.get(signature, 0) < _NUM_WATCHED
        if self._ledger is not None or not is_due:
            return
        self._limit_bytes, device = limit_bytes, self._trainer.strategy.root_device
        optimizers, limit = self._trainer.optimizers, self._limit()
        held = self._held.beside_steps(self._trainer, self._model)
        ledger = MemoryLedger(self._model, optimizers, batch, device=device, limit=limit, held=held)
        self._ledger, self._signature = ledger.__enter__(), signature

    def end(self) -> None:
        """The step is over, or has failed."""
        ledger, self._ledger, self._refusal = self._ledger, None, None
        if ledger is None:
            return
        ledger.__exit__(None, None, None)
        held = ledger.breakdown(per_module=False, timeline=False)
        over_bytes = held.ledger_peak_bytes - held.start_bytes
        self._over_bytes[self._signature] = max(over_bytes, self.over_bytes(self._signature))
        self._num_watched[self._signature] = self._num_watched.get(self._signature, 0) + 1

    def _refuse(self, error: LimitReached) -> Exception:
        ledger = self._ledger
        assert ledger is not None
        now = ledger.held_between(ledger.tick, ledger.tick)
        refused = update_limit_error(error.limit_bytes, error.needed_bytes, now, 0, 0, at_least=True)
        self._refusal = UpdateOutOfReach(str(refused))
        return self._refusal


class UpdateOutOfReach(OutOfReach, MisconfigurationException):
    """A step does not keep the limit; an evaluation of the model in it may, in smaller chunks."""


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
