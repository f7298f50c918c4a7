"""Explorers and what their pairs mean to a user: ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.choice.explorer import Explorer
from lightning_memtrain.planning.fit.choice.pairs import Pair
from lightning_memtrain.planning.fit.techniques import FREE, Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.trials.switched_on import SwitchedOn
from lightning_memtrain.planning.fit.trials.workshop import Tried, Workshop
from lightning_memtrain.planning.fit.way import Way

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
        may_time = may_time and not self.by_hand and all(one.may_be_timed for one in self.switches)
        self.explorer = Explorer(
            workshop,
            self._switched,
            call_seconds,
            least_bytes,
            may_chunk,
            may_time,
            is_late,
            is_thorough=set(self.switches) <= {FREE},
        )

    def _switched(self, num_chunks: int) -> SwitchedOn:
        facts = self._facts
        return SwitchedOn(
            tuple(one for switch in self.switches for one in switch.settings(facts, num_chunks)),
            tuple(one for switch in self.switches for one in switch.stand_ins(facts, num_chunks)),
            {
                name: value
                for switch in self.switches
                for name, value in switch.trainer_arguments(facts).items()
            },
        )

    @property
    def by_hand(self) -> tuple[str, ...]:
        """Lines that only the user can write."""
        return tuple(line for switch in self.switches for line in switch.by_hand(self._facts))

    def unnamed_change(self) -> str:
        """A technique that says that it is not exact, though none of what is switched on names a change.

        Returns:
            Its name; empty if there is none.
        """
        if any(switch.allow for switch in self.switches):
            return ""
        names = {one.name for one in self._switched(1).techniques}
        return next((name for name in names if self._workshop.exact.get((name, False)) is False), "")

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
            allocated = reserved * self._plain.allocated_bytes // self._plain.trace.reserved_bytes
        changes = [switch.changes for switch in self.switches if switch.changes]
        if pair.num_chunks > 1 and self._facts.has_batchnorm:
            changes.append(PERMISSIONS[BATCHNORM].changes)
        on = self._switched(pair.num_chunks)
        techniques = (*self._workshop.settings(pair.num_chunks, pair.segments), *on.techniques)
        exact = self._workshop.exact
        return Way(
            techniques=techniques,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            time_ratio=pair.seconds / plain_seconds if plain_seconds else None,
            # What a technique says of itself in its trial; recomputation has been in one where it is chosen.
            exact=not changes and all(exact.get((one.name, pair.num_chunks > 1), True) for one in techniques),
            changes=tuple(changes),
            trainer_arguments=on.trainer_arguments,
            by_hand=self.by_hand,
        )
