"""Explorers and what their pairs mean to a user: ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.choice.explorer import Explorer
from lightning_memtrain.planning.fit.choice.pairs import Pair
from lightning_memtrain.planning.fit.techniques import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.trials.workshop import Tried, Workshop
from lightning_memtrain.planning.fit.way import TechniqueSettings, Way

BATCHNORM = "batchnorm-statistics"


class Family:
    """All pairs of microbatch size and recomputation with some techniques switched on.

    Args:
        workshop: tries ways.
        plain: the run as it is.
        switches: what is switched on.
        call_seconds: what recomputing a call takes beside its operators.
        may_chunk: whether microbatches may be used.
        may_time: whether ways may be run for real, to see how long they take.
        is_late: whether so much time was spent that what was found will do.
    """

    def __init__(
        self,
        workshop: Workshop,
        plain: Tried,
        switches: Sequence[Switch],
        call_seconds: float,
        may_chunk: bool,
        may_time: bool = False,
        is_late: Callable[[], bool] = lambda: False,
    ) -> None:
        self._workshop = workshop
        self._plain = plain
        self._facts: RunFacts = plain.trace.facts
        self.switches = tuple(switches)
        least_bytes = plain.trace.ledger_bytes / 500
        may_time = may_time and all(switch.may_be_timed for switch in self.switches)
        self.explorer = Explorer(
            workshop,
            self._switched,
            call_seconds,
            least_bytes,
            may_chunk,
            may_time,
            is_late,
            is_thorough=not self.switches,
        )

    def _switched(self, num_chunks: int) -> list[TechniqueSettings]:
        return [one for switch in self.switches for one in switch.settings(self._facts, num_chunks)]

    def way(self, pair: Pair, plain_seconds: float) -> Way:
        """A pair as a way.

        Args:
            pair: of this family.
            plain_seconds: of a step of the plain run.

        Returns:
            The way.
        """
        tried = self.explorer.tried.get((pair.num_chunks, pair.segments))
        reserved = pair.peak_bytes - self._workshop.device.context_bytes
        allocated = reserved
        if tried is not None:
            allocated = tried.allocated_bytes
        elif self._workshop.device.is_cuda:
            allocated = reserved - (self._plain.trace.reserved_bytes - self._plain.trace.allocated_bytes)
        changes = [PERMISSIONS[switch.allow].changes for switch in self.switches if switch.allow]
        if pair.num_chunks > 1 and self._facts.has_batchnorm:
            changes.append(PERMISSIONS[BATCHNORM].changes)
        techniques = (
            *self._workshop.settings(pair.num_chunks, pair.segments),
            *self._switched(pair.num_chunks),
        )
        is_exact = not changes and (tried is None or all(tried.trace.facts.exact.values()) or not techniques)
        return Way(
            techniques=techniques,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            time_ratio=pair.seconds / plain_seconds if plain_seconds else None,
            exact=is_exact,
            changes=tuple(changes),
        )
