"""One step without recomputation, seen as a chain of module calls: what each holds, and what it takes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing.insertion import choosable
from lightning_memtrain.checkpointing.items import Item
from lightning_memtrain.checkpointing.own_checkpoints import is_backward
from lightning_memtrain.checkpointing.writes import version_of
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode, OperatorTraits
from lightning_memtrain.ledger.observers.saved_tensors import SAVED_TENSOR_HOOKS
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.ledger.operators.workspace import OpCall, op_call
from lightning_memtrain.ledger.storage_records import TRANSIENT, StorageRecord
from lightning_memtrain.ledger.tensors.storages import tensors_in

_ACCUMULATES_GRADIENT = 2**64 - 1
# Modules that hold less than this part of the peak are not looked into.
_LEAST_PART = 1 / 500
_DEEPEST = 6


@dataclass(eq=False)
class ModuleCall:
    """One call of a module in the step.

    Args:
        name: path of the module; ``None`` for the step itself.
        start: tick of the ledger when it began; ``end``: when it ended.
        first_save: how many tensors had been saved for backward when it began; ``last_save``: at its end.
        first_op: how many operators had run when it began; ``last_op``: at its end.
        backward_start: tick when its backward began, ``None`` if it has none; ``backward_end``: of its last
            operator there.
        taken: records of its arguments, each with whether the call wrote to it.
        returned: records of its outputs.
        versions: its arguments while it runs, each with its version.
        calls: what it calls in turn.
        parent: what called it.
    """

    name: str | None
    start: int = 0
    end: int = 0
    first_save: int = 0
    last_save: int = 0
    first_op: int = 0
    last_op: int = 0
    backward_start: int | None = None
    backward_end: int = 0
    taken: list[tuple[StorageRecord, bool]] = field(default_factory=list)
    returned: list[StorageRecord] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    parent: ModuleCall | None = None


class StepWatch:
    """Follows the module calls of one step, beside a ledger that is entered already.

    Args:
        model: the module whose submodules are followed.
        ledger: counts the bytes.
        left_out: paths of submodules that are not followed.
    """

    def __init__(
        self, model: nn.Module, ledger: MemoryLedger, left_out: Collection[str] = frozenset()
    ) -> None:
        self.root = ModuleCall(None)
        self.op_calls: list[OpCall] = []
        #: Of each tensor that was saved, its records and how many operators had run by then.
        self.saves: list[tuple[list[StorageRecord], int]] = []
        self.forward_end = 0
        self._model = model
        self._ledger = ledger
        self._left_out = left_out
        # `None` for calls that are not followed.
        self._stack: list[ModuleCall | None] = [self.root]
        self._first_nodes = [-1]
        self._calls_of_nodes = [self.root]
        self._undo = ExitStack()
        self._operators = OperatorMode()  # type: ignore[no-untyped-call]

    def __enter__(self) -> StepWatch:
        self.root.start = self._ledger.tick
        candidates = choosable(self._model).difference(self._left_out)
        for name, module in self._model.named_modules():
            if name in candidates and name:
                before = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                after = module.register_forward_hook(self._leave, always_call=True)
                self._undo.callback(before.remove)
                self._undo.callback(after.remove)
        SAVED_TENSOR_HOOKS.add(self._on_saved)
        self._undo.callback(SAVED_TENSOR_HOOKS.remove, self._on_saved)
        self._operators.begin(self._on_operator, lambda operator, results: None)
        self._undo.callback(self._operators.end)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()
        root = self.root
        root.end, root.last_save, root.last_op = self._ledger.tick, len(self.saves), len(self.op_calls)

    def _records(self, tree: Any) -> list[StorageRecord]:
        return [record for tensor in tensors_in(tree) for record in self._ledger.records_of(tensor)]

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_over():
                self._stack.append(None)
                return
            outer = self._stack[-1]
            assert outer is not None
            call = ModuleCall(name, parent=outer)
            call.versions = [(tensor, version_of(tensor)) for tensor in tensors_in((args, kwargs))]
            call.start, call.first_save, call.first_op = self._now()
            outer.calls.append(call)
            self._stack.append(call)
            self._note_change()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._stack.pop()
        if call is None:
            return
        call.end, call.last_save, call.last_op = self._now()
        call.returned = self._records(output)
        for tensor, version in call.versions:
            call.taken += [(record, version_of(tensor) != version) for record in self._records(tensor)]
        call.versions.clear()
        self._note_change()

    def _is_over(self) -> bool:
        """Whether backward has begun: what is called from then on is recomputed, or evaluated once more."""
        return self.forward_end > 0 or is_backward()

    def _now(self) -> tuple[int, int, int]:
        return self._ledger.tick, len(self.saves), len(self.op_calls)

    def _note_change(self) -> None:
        self._first_nodes.append(torch._C._autograd._get_sequence_nr())
        innermost = self._stack[-1]
        assert innermost is not None
        self._calls_of_nodes.append(innermost)

    def _on_saved(self, tensor: Tensor) -> None:
        self.saves.append((self._ledger.records_of(tensor), len(self.op_calls)))

    def _on_operator(self, operator: OperatorTraits, args: Any, kwargs: Any) -> None:
        if not is_backward():
            if self.forward_end == 0:
                self.op_calls.append(op_call(operator.func, args, kwargs))
            return
        tick = self._ledger.tick
        self.forward_end = self.forward_end or tick
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else _ACCUMULATES_GRADIENT
        if number == _ACCUMULATES_GRADIENT:
            return
        call: ModuleCall | None = self._calls_of_nodes[bisect_right(self._first_nodes, number) - 1]
        while call is not None:
            if call.backward_start is None:
                call.backward_start = tick
            call.backward_end = tick
            call = call.parent


class StepProfile:
    """Turns a step that was watched into items to choose from.

    Args:
        watch: the watch, left.
        records: the ledger's records.
        times: how long operators take.
        call_seconds: what recomputing a call takes beside its operators.
    """

    def __init__(
        self, watch: StepWatch, records: Sequence[StorageRecord], times: OpTimes, call_seconds: float = 0.0
    ) -> None:
        self._watch = watch
        self._call_seconds = call_seconds
        self._times = times
        self._records = sorted(records, key=lambda record: record.born)
        self._births = [record.born for record in self._records]
        self._live = self._live_bytes()
        self.peak_bytes = max(self._live)
        # Of each storage that was saved, the first and the last time.
        self._saved: dict[int, tuple[int, int]] = {}
        for index, (saved, _) in enumerate(watch.saves):
            for record in saved:
                first, _ = self._saved.get(id(record), (index, index))
                self._saved[id(record)] = first, index
        self.forward_seconds = times.seconds(watch.op_calls)

    def chain(self) -> tuple[Item, ...]:
        """The step as items: what the root calls, with gaps between."""
        root = self._watch.root
        return self._parts(
            root, (root.start, self._watch.forward_end), (self._watch.forward_end, root.end), 0
        )

    # ------------------------------------------------------------------ items

    def _parts(
        self, call: ModuleCall, forward: tuple[int, int], backward: tuple[int, int], depth: int
    ) -> tuple[Item, ...]:
        """What happens inside of a call, in the order of forward; its backward goes from right to left."""
        inner = [one for one in call.calls if one.backward_start is not None and self._matters(one)]
        items: list[Item] = []
        forward_at, backward_at, last_op = forward[0], backward[1], call.first_op
        previous: ModuleCall | None = None
        for one in inner:
            assert one.backward_start is not None
            if previous is None or one.first_op > last_op:
                items.append(self._gap((forward_at, one.start), (one.backward_end, backward_at)))
                previous = None  # something runs between, so they are not recomputed together
            # Up to the backward of the call behind it, where no gap stands for what is between.
            items.append(
                self._unit(
                    one, previous, (one.backward_start, backward_at if previous else one.backward_end), depth
                )
            )
            forward_at, backward_at, last_op, previous = one.end, one.backward_start, one.last_op, one
        items.append(self._gap((forward_at, forward[1]), (backward[0], backward_at)))
        return tuple(items)

    def _unit(
        self, call: ModuleCall, previous: ModuleCall | None, backward: tuple[int, int], depth: int
    ) -> Item:
        last_op = self._last_op_needed(call)
        ops = self._watch.op_calls
        goes_deeper = depth < _DEEPEST and any(self._matters(one) for one in call.calls)
        return Item(
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

    def _gap(self, forward: tuple[int, int], backward: tuple[int, int]) -> Item:
        return Item(None, self._most_live(*forward), self._most_live(*backward))

    def _matters(self, call: ModuleCall) -> bool:
        saved = self._watch.saves[call.first_save : call.last_save]
        held = {
            id(record): record.num_bytes
            for records, _ in saved
            for record in records
            if _is_transient(record)
        }
        return sum(held.values()) >= self.peak_bytes * _LEAST_PART

    def _last_op_needed(self, call: ModuleCall) -> int:
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
        return max(self._live[first : max(first, last) + 1])

    def _born_in(self, call: ModuleCall) -> list[StorageRecord]:
        return self._records[bisect_right(self._births, call.start) : bisect_right(self._births, call.end)]

    def _own_peak_bytes(self, call: ModuleCall) -> int:
        changes = []
        for record in self._born_in(call):
            changes.append((record.born, record.num_bytes))
            if record.died is not None and record.died <= call.end:
                changes.append((record.died, -record.num_bytes))
        return max(accumulate(num_bytes for _, num_bytes in sorted(changes)), default=0)

    def _is_saved_within(self, record: StorageRecord, first: int, last: int) -> bool:
        saves = self._saved.get(id(record))
        return saves is not None and first <= saves[0] and saves[1] < last

    def _internal_bytes(self, call: ModuleCall) -> int:
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

    def _opening_bytes(self, call: ModuleCall) -> int:
        """Inputs that would have to be kept longer, or copied since the call changes them."""
        assert call.backward_start is not None
        kept = {
            id(record): record.num_bytes
            for record, is_written in call.taken
            if is_written or (_is_transient(record) and not _outlives(record, call.backward_start))
        }
        return sum(kept.values())

    def _boundary_bytes(self, previous: ModuleCall, call: ModuleCall) -> int:
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
