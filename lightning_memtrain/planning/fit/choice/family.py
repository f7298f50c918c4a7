"""Explorers and what their pairs mean to a user: ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from lightning_memtrain.core import format_bytes
from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.choice.explorer import Explorer
from lightning_memtrain.planning.fit.choice.pairs import Pair
from lightning_memtrain.planning.fit.techniques import FREE, Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.trials.switched_on import SwitchedOn
from lightning_memtrain.planning.fit.trials.tried_ways import Tried
from lightning_memtrain.planning.fit.trials.workshop import Workshop
from lightning_memtrain.planning.fit.way import Way

BATCHNORM = "batchnorm-statistics"
#: What is switched on beside costs something in Python that no operator shows: it has to be so much faster.
NOTABLY_FASTER = 0.98
#: Of bytes: what saves less is not worth a line.
NOTABLY_LESS = 0.998


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

    def why_useless(self, first: Family, chosen: Pair | None) -> str:
        """Why it is not worth a try beside what there is; tries the batch as a whole.

        Args:
            first: without what this one has switched on.
            chosen: the best pair so far; ``None`` if nothing keeps the limit.

        Returns:
            The reason; empty if it saves something or is faster, and says what it changes.
        """
        try:
            tried = self.explorer.trace(1)
        except Exception as error:  # what goes wrong in a trial is the answer
            return first_line(error)
        before = first.explorer.tried[1, ()]
        unnamed = self.unnamed_change()
        if unnamed:
            return f"{unnamed} says that it changes the result, unasked"
        is_faster = self._workshop.seconds(tried) < NOTABLY_FASTER * self._workshop.seconds(before)
        saves = tried.needed_bytes < NOTABLY_LESS * before.needed_bytes or self._saves_later(first, chosen)
        if saves or is_faster:
            return ""
        needed = f"{format_bytes(tried.needed_bytes)} for {format_bytes(before.needed_bytes)}"
        return f"saves next to nothing here: {needed}"

    def _saves_later(self, first: Family, chosen: Pair | None) -> bool:
        """Whether it saves where less is held already, such as gradients beside few activations."""
        lowest = first.explorer.front()[-1]
        if chosen is None and self.explorer.front()[-1].peak_bytes < NOTABLY_LESS * lowest.peak_bytes:
            return True
        pair = chosen or lowest
        if pair.num_chunks > 1 and not self.explorer.may_chunk:
            return False
        with suppress(Exception):
            here = self.explorer.at(pair.num_chunks, pair.segments)
            return here.peak_bytes < NOTABLY_LESS * pair.peak_bytes
        return False

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


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).splitlines()[0] if str(error) else repr(error)
