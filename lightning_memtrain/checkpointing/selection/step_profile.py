"""One step without recomputation as a chain of stages: what each module call holds, and what it takes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Protocol

from lightning_memtrain.checkpointing.selection.call_profiler import ProfiledCall
from lightning_memtrain.checkpointing.selection.step_chain import ChainStage
from lightning_memtrain.ledger.operators.workspace import OpCall
from lightning_memtrain.ledger.storage_records import TRANSIENT, StorageRecord

# Modules that hold less than this part of the peak are not looked into.
_LEAST_PART = 1 / 500
_DEEPEST = 6


class WatchedCalls(Protocol):
    """What :class:`.CallProfiler` has seen, whatever holds it now."""

    @property
    def root(self) -> ProfiledCall:
        """The call of the step itself."""

    @property
    def op_calls(self) -> Sequence[OpCall]:
        """Operators of forward."""

    @property
    def saves(self) -> Sequence[tuple[list[StorageRecord], int]]:
        """Of each tensor that was saved, its records and how many operators had run by then."""

    @property
    def forward_end(self) -> int:
        """Tick at which backward began."""


class Times(Protocol):
    """Knows how long operators take, as :class:`.OpTimes` does."""

    def seconds(self, calls: Iterable[OpCall]) -> float:
        """Seconds that all of the calls take together."""


class StepProfile:
    """Turns a step that was watched into stages to choose from.

    Args:
        watch: the watch, left.
        records: the ledger's records.
        times: how long operators take.
        call_seconds: what recomputing a call takes beside its operators.
        least_bytes: modules that hold less are not looked into; by default a small part of the peak.
        within_operators: bytes that operators hold while they run, results among them, each with the tick
            before; those of no operator count unless they are given.
    """

    def __init__(
        self,
        watch: WatchedCalls,
        records: Sequence[StorageRecord],
        times: Times,
        call_seconds: float = 0.0,
        least_bytes: float | None = None,
        within_operators: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._watch = watch
        self._call_seconds = call_seconds
        self._times = times
        self._records = sorted(records, key=lambda record: record.born)
        self._births = [record.born for record in self._records]
        self._live = self._live_bytes()
        # With what the operator that runs next holds meanwhile.
        self._at_most = [*self._live]
        self._within = sorted(within_operators)
        for tick, num_bytes in within_operators:
            self._at_most[tick] = max(self._at_most[tick], self._live[tick] + num_bytes)
        self.peak_bytes = max(self._live)
        self._least_bytes = self.peak_bytes * _LEAST_PART if least_bytes is None else least_bytes
        # Of each storage that was saved, the first and the last time.
        self._saved: dict[int, tuple[int, int]] = {}
        for index, (saved, _) in enumerate(watch.saves):
            for record in saved:
                first, _ = self._saved.get(id(record), (index, index))
                self._saved[id(record)] = first, index
        self.forward_seconds = times.seconds(watch.op_calls)

    def chain(self) -> tuple[ChainStage, ...]:
        """The step as stages: what the root calls, with gaps between."""
        root = self._watch.root
        return self._parts(
            root, (root.start, self._watch.forward_end), (self._watch.forward_end, root.end), 0
        )

    # ------------------------------------------------------------------ stages

    def _parts(
        self, call: ProfiledCall, forward: tuple[int, int], backward: tuple[int, int], depth: int
    ) -> tuple[ChainStage, ...]:
        """What happens inside of a call, in the order of forward; its backward goes from right to left."""
        inner = [one for one in call.calls if one.backward_start is not None and self._matters(one)]
        stages: list[ChainStage] = []
        forward_at, backward_at, last_op = forward[0], backward[1], call.first_op
        previous: ProfiledCall | None = None
        for one in inner:
            assert one.backward_start is not None
            if previous is None or one.first_op > last_op:
                stages.append(self._gap((forward_at, one.start), (one.backward_end, backward_at)))
                previous = None  # something runs between, so they are not recomputed together
            # Up to the backward of the call behind it, where no gap stands for what is between.
            stages.append(
                self._stage(
                    one, previous, (one.backward_start, backward_at if previous else one.backward_end), depth
                )
            )
            forward_at, backward_at, last_op, previous = one.end, one.backward_start, one.last_op, one
        stages.append(self._gap((forward_at, forward[1]), (backward[0], backward_at)))
        return tuple(stages)

    def _stage(
        self, call: ProfiledCall, previous: ProfiledCall | None, backward: tuple[int, int], depth: int
    ) -> ChainStage:
        last_op = self._last_op_needed(call)
        ops = self._watch.op_calls
        goes_deeper = depth < _DEEPEST and any(self._matters(one) for one in call.calls)
        return ChainStage(
            name=call.name,
            forward_peak_bytes=self._most_live(call.start, call.end),
            backward_peak_bytes=self._most_live(*backward),
            internal_bytes=self._internal_bytes(call),
            boundary_bytes=0 if previous is None else self._boundary_bytes(previous, call),
            backward_start_bytes=self._live[backward[0]],
            own_peak_bytes=self._own_peak_bytes(call),
            seconds=self._times.seconds(ops[call.first_op : last_op]) + self._call_seconds,
            opening_bytes=self._opening_bytes(call),
            tail_seconds=self._times.seconds(ops[last_op : call.last_op]),
            parts=self._parts(call, (call.start, call.end), backward, depth + 1) if goes_deeper else (),
        )

    def _gap(self, forward: tuple[int, int], backward: tuple[int, int]) -> ChainStage:
        return ChainStage(None, self._most_live(*forward), self._most_live(*backward))

    def _matters(self, call: ProfiledCall) -> bool:
        saved = self._watch.saves[call.first_save : call.last_save]
        held = {
            id(record): record.num_bytes
            for records, _ in saved
            for record in records
            if _is_transient(record)
        }
        return sum(held.values()) >= self._least_bytes

    def _last_op_needed(self, call: ProfiledCall) -> int:
        """Recomputation ends where the last tensor was saved."""
        saves = self._watch.saves[call.first_save : call.last_save]
        return saves[-1][1] if saves else call.first_op

    # ------------------------------------------------------------------ bytes

    def _live_bytes(self) -> list[int]:
        """Live bytes at each tick."""
        ends = [record.died for record in self._records if record.died is not None]
        changes = [0] * (max([*self._births, *ends, self._watch.root.end], default=0) + 1)
        for record in self._records:
            changes[record.born] += record.num_bytes
            if record.died is not None:
                changes[record.died] -= record.num_bytes
        return list(accumulate(changes))

    def _most_live(self, first: int, last: int) -> int:
        return max(self._at_most[first : max(first, last) + 1])

    def _born_in(self, call: ProfiledCall) -> list[StorageRecord]:
        return self._records[bisect_right(self._births, call.start) : bisect_right(self._births, call.end)]

    def _own_peak_bytes(self, call: ProfiledCall) -> int:
        changes = []
        for record in self._born_in(call):
            changes.append((record.born, record.num_bytes))
            if record.died is not None and record.died <= call.end:
                changes.append((record.died, -record.num_bytes))
        changes.sort()
        ticks = [tick for tick, _ in changes]
        live = [0, *accumulate(num_bytes for _, num_bytes in changes)]
        first, last = (bisect_right(self._within, (tick, 0)) for tick in (call.start, call.end))
        inside = (live[bisect_right(ticks, tick)] + num_bytes for tick, num_bytes in self._within[first:last])
        return max(max(live), max(inside, default=0))

    def _is_saved_within(self, record: StorageRecord, first: int, last: int) -> bool:
        saves = self._saved.get(id(record))
        return saves is not None and first <= saves[0] and saves[1] < last

    def _internal_bytes(self, call: ProfiledCall) -> int:
        """What only the call's own backward needs."""
        returned = {id(record) for record in call.returned}
        return sum(
            record.num_bytes
            for record in self._born_in(call)
            if _is_transient(record)
            and id(record) not in returned
            and _outlives(record, call.end)
            and self._is_saved_within(record, call.first_save, call.last_save)
        )

    def _opening_bytes(self, call: ProfiledCall) -> int:
        """Inputs that would have to be kept longer, or copied since the call changes them."""
        assert call.backward_start is not None
        kept = {
            id(record): record.num_bytes
            for record, is_written in call.taken
            if is_written or (_is_transient(record) and not _outlives(record, call.backward_start))
        }
        return sum(kept.values())

    def _boundary_bytes(self, previous: ProfiledCall, call: ProfiledCall) -> int:
        returned = {id(record) for record in previous.returned}
        passed_on = {id(record): record for record, _ in call.taken if id(record) in returned}
        return sum(
            record.num_bytes
            for record in passed_on.values()
            if _is_transient(record)
            and _outlives(record, call.end)
            and self._is_saved_within(record, previous.first_save, call.last_save)
        )


def _is_transient(record: StorageRecord) -> bool:
    return record.category in TRANSIENT


def _outlives(record: StorageRecord, tick: int) -> bool:
    return record.died is None or record.died > tick
