"""Follows operators to know which line of the user's code has made each storage."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import (
    current_autograd_node,
    next_sequence_number,
    storage_key,
    tree_leaves,
)
from lightning_memtrain.core import CodeSite
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode, OperatorTraits
from lightning_memtrain.ledger.storage_records import FROM_THE_START, StorageRecord
from lightning_memtrain.ledger.tensors.storages import PLAIN_TENSORS
from lightning_memtrain.report.stacks.user_frames import CodeLine, line_of_user


class MadeBy(NamedTuple):
    """Who has made a storage.

    Args:
        line: of the user's code, if it is known.
        in_backward: whether it was the line's backward.
    """

    line: CodeLine | None
    in_backward: bool


_UNKNOWN = MadeBy(None, False)


class KnownLines:
    """Lines of storages that may outlive the step that has made them, such as an optimizer's state."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], MadeBy]] = {}

    def add(self, tensor: Tensor, made_by: MadeBy) -> None:
        """Note who has made a tensor.

        Args:
            tensor: any; wrappers of others have no storage of their own.
            made_by: who.
        """
        if type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._known[storage_key(storage)] = weakref.ref(storage), made_by

    def live(self) -> Iterator[tuple[Tensor, MadeBy]]:
        """What is still live; the rest is forgotten."""
        for key, (reference, made_by) in [*self._known.items()]:
            storage = reference()
            if storage is None:
                del self._known[key]
            else:
                yield torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), made_by


class StackRecorder:
    """Notes lines beside a ledger, within which it begins and ends.

    A storage that a backward makes belongs to the line whose forward it is the backward of: on a GPU a
    backward runs in threads of its own, where no code of the user's is.

    Args:
        ledger: which is open meanwhile.
        known: lines of what earlier steps have made; those of this one are added.
    """

    def __init__(self, ledger: MemoryLedger, known: KnownLines) -> None:
        self._ledger = ledger
        self._known = known
        # Views are made here, since the ledger would see how. Until it is begun, they keep what they show.
        self._before_step = [*known.live()]
        self._lines_before: dict[int, MadeBy] = {}
        self._records_before: list[StorageRecord] = []
        self._mode: OperatorMode | None = OperatorMode()  # type: ignore[no-untyped-call]
        self._tick = FROM_THE_START
        # By the tick at which a storage was made, which no other one has.
        self._lines: dict[int, MadeBy] = {}
        # By the number that autograd has given to an operator.
        self._of_forward: dict[int, CodeLine] = {}
        self._asides: list[tuple[int, int]] = []
        self._aside_since: int | None = None

    def begin(self) -> None:
        """Follow operators from now on, in the present thread and in those of its backward."""
        # Gradients of the step before may be freed before this one is over.
        while self._before_step:
            tensor, made_by = self._before_step.pop()
            for record in self._ledger.records_of(tensor):
                self._records_before.append(record)  # so that its identity stays its own
                self._lines_before[id(record)] = made_by
            del tensor
        if self._mode is not None:
            self._mode.begin(self._before, self._after)

    def end(self) -> None:
        """Follow no more; called again, nothing happens."""
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.end()

    def begin_aside(self) -> None:
        """What comes next is no part of the step."""
        self._aside_since = self._ledger.tick

    def end_aside(self) -> None:
        """What comes next is a part of it again."""
        if self._aside_since is not None:
            self._asides.append((self._aside_since, self._ledger.tick))
            self._aside_since = None

    def _before(self, traits: OperatorTraits, args: Any, kwargs: Any) -> None:
        self._tick = self._ledger.tick

    def _after(self, traits: OperatorTraits, results: Any) -> None:
        node = current_autograd_node()
        if node is None:
            made_by = MadeBy(line_of_user(sys._getframe(1)), False)
            if made_by.line is not None:
                # Operators that autograd does not follow come after the one that has this number.
                self._of_forward.setdefault(next_sequence_number() - 1, made_by.line)
        if self._ledger.tick == self._tick:
            return
        if node is not None:
            # A line of the user's runs within a backward when it is recomputed, or in a hook.
            line = line_of_user(sys._getframe(1))
            made_by = MadeBy(line or self._of_forward.get(node._sequence_nr()), line is None)
        for result in (results,) if isinstance(results, Tensor) else tree_leaves(results):
            if not isinstance(result, Tensor):
                continue
            for record in self._ledger.records_of(result):
                if record.born > self._tick:
                    self._lines.setdefault(record.born, made_by)
                    self._known.add(result, made_by)

    def sites(self) -> tuple[CodeSite, ...]:
        """Who has made what is live at the ledger's peak, largest first; together the ledger's peak."""
        records = [*self._ledger.records]
        peak_tick = _peak_tick(records, self._asides)
        lines = self._lines_of(records)
        sums: dict[tuple[Any, ...], list[int]] = {}
        for record in records:
            if not record.live_at(peak_tick):
                continue
            made_by = lines.get(id(record), _UNKNOWN)
            module = record.owner if record.owner is not None else record.producer
            row = sums.setdefault((*made_by, record.existed_before, record.category.value, module), [0, 0])
            row[0] += record.num_bytes
            row[1] += 1
        sites = [
            CodeSite(
                file="" if line is None else line.file,
                line=0 if line is None else line.line,
                function="" if line is None else line.function,
                in_backward=in_backward,
                was_there=was_there,
                category=category,
                module=module,
                num_bytes=num_bytes,
                num_storages=count,
            )
            for (line, in_backward, was_there, category, module), (num_bytes, count) in sums.items()
        ]
        return tuple(sorted((site for site in sites if site.num_bytes), key=lambda site: -site.num_bytes))

    def _lines_of(self, records: Sequence[StorageRecord]) -> dict[int, MadeBy]:
        """Who has made what, by the identity of the record."""
        lines = dict(self._lines_before)
        lines |= {id(one): self._lines[one.born] for one in records if one.born in self._lines}
        # What is used for something else, or has another size, goes on as another record of the same moment.
        earlier = {one.died: one for one in records if one.died is not None}
        for one in records:
            before = earlier.get(one.born)
            if before is not None and id(before) in lines:
                lines.setdefault(id(one), lines[id(before)])
        for tensor, made_by in self._known.live():
            for record in self._ledger.records_of(tensor):
                link: StorageRecord | None = record
                while link is not None:
                    lines.setdefault(id(link), made_by)
                    link = earlier.get(link.born)
        return lines


def _peak_tick(records: Iterable[StorageRecord], asides: Sequence[tuple[int, int]]) -> int:
    """The first moment at which most was live, as a breakdown has it."""
    changes = [(record.born, record.num_bytes) for record in records]
    changes += [(record.died, -record.num_bytes) for record in records if record.died is not None]
    total = peak = 0
    peak_tick = FROM_THE_START
    for tick, moment in groupby(sorted(changes), key=itemgetter(0)):
        total += sum(num_bytes for _, num_bytes in moment)
        if total > peak and not any(begin < tick < end for begin, end in asides):
            peak, peak_tick = total, tick
    return peak_tick
