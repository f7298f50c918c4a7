"""Keeps the life of every storage: when it was made, resized and freed, and what it is used for."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch

from lightning_memtrain.compat.torch_private import skip_in_dynamo, storage_key
from lightning_memtrain.core import Category
from lightning_memtrain.ledger.operators.workspace import PeakEstimator
from lightning_memtrain.ledger.storage_records import (
    FROM_THE_START,
    NEVER,
    StorageRecord,
    StorageReference,
    Survivor,
)
from lightning_memtrain.ledger.tensors.storages import PLAIN_TENSORS, storages_of

#: What a training step leaves behind by right.
TRAINING_STATE = (
    *(Category.PARAMETERS, Category.BUFFERS, Category.GRADIENTS, Category.OPTIMIZER_STATE),
    *(Category.GATHERED_WEIGHTS, Category.UNSHARDED_GRADIENTS, Category.BUCKETS),
)

# Asked for around every operator; looking an attribute up takes as long as the rest of the question.
_STRIDED = torch.strided
_TEMPORARY = Category.TEMPORARY
_THERE_BEFORE = (Category.INPUTS, Category.HELD)


class StorageTracker:
    """Knows all storages of one device, live and past, by the address of the storage.

    Args:
        device: tensors on other devices are passed over.
        estimate: told of every allocation and release, if given.
    """

    def __init__(self, device: torch.device, estimate: PeakEstimator | None = None) -> None:
        self.device = device
        self.counts_fakes = False
        """Whether fake tensors, which have sizes but no bytes, are counted as if they had."""
        self.records: list[StorageRecord] = []
        self.events: list[tuple[int, str]] = []
        """Ticks and names; as tuples they cost the garbage collector nothing."""
        self.live: dict[int, StorageReference] = {}
        self.tick = FROM_THE_START
        self.asides: list[tuple[int, int]] = []
        """Ticks between which something ran that is no part of the step."""
        self.live_bytes = 0
        """What is live now."""
        self.late_bytes = 0
        """What was live from the start but was first seen later, also what is freed by now."""
        self.is_open = True
        self.estimate = estimate
        # References are kept for long, by survivors, and do not keep the tracker.
        self._tell_freed = functools.partial(_tell_freed, weakref.ref(self))

    def close(self) -> None:
        """Leave everything as it is now: later releases are not written down."""
        self.is_open = False

    def live_entries(self) -> list[StorageReference]:
        """What is live now, to go through.

        Any object that is made may start the garbage collector, and another thread may let go of a tensor at
        any time; :attr:`live` changes with each storage that is freed. Taking all of it at once is one step
        for both.
        """
        return [*self.live.values()]

    def records_of(self, tensor: torch.Tensor) -> list[StorageRecord]:
        """The records of the storages behind a tensor, of any shape and dtype, as far as they are counted."""
        found = (self.record_of(storage) for storage in storages_of(tensor))
        return [record for record in found if record is not None]

    def survivors(self) -> tuple[Survivor, ...]:
        """What is still live of all that was made meanwhile and is no training state."""
        return tuple(
            Survivor(record.producer, record.num_bytes, reference)
            for reference in self.live_entries()
            if not (record := reference.record).existed_before and record.category not in TRAINING_STATE
        )

    def begin_aside(self) -> None:
        """What comes next is no part of the step."""
        self.asides.append((self.tick, NEVER))

    def end_aside(self) -> None:
        """What comes next is a part of the step again."""
        begin, _ = self.asides.pop()
        self.asides.append((begin, self.tick))

    def annotate(self, name: str) -> None:
        """Put a named event on the timeline, at the present tick."""
        self.events.append((self.tick, name))

    def record_of(self, storage: torch.UntypedStorage) -> StorageRecord | None:
        """The record of a live storage, or ``None`` if it is not tracked."""
        reference = self.live.get(storage_key(storage))
        return reference.record if reference is not None else None

    def entry_of(self, tensor: torch.Tensor) -> StorageReference | None:
        """The entry of a plain tensor's storage, if it is tracked with its present size; of others, ``None``.

        Asked of every argument of every operator, so it looks at nothing else.
        """
        if type(tensor) not in PLAIN_TENSORS or tensor.layout is not _STRIDED:
            return None
        storage = tensor.untyped_storage()
        entry = self.live.get(storage_key(storage))
        return entry if entry is not None and entry.record.num_bytes == storage.nbytes() else None

    def track_new(self, tensor: torch.Tensor, producer: str) -> Sequence[StorageRecord]:
        """Write down the storages of an operator's result that are new, made by the module ``producer``.

        Args:
            tensor: the result, of any shape and dtype.
            producer: path of the module.

        Returns:
            The records of the new storages.
        """
        if type(tensor) in PLAIN_TENSORS and tensor.layout is _STRIDED:  # nearly always, so without a list
            storage = tensor.untyped_storage()
            if self._known(storage) is not None or tensor.device != self.device:
                return ()
            self.tick += 1
            return (self._write(storage, self.tick, _TEMPORARY, producer),)
        new: list[StorageRecord] = []
        for storage in self._storages_of(tensor):
            if self._known(storage) is None:
                if tensor.device != self.device:
                    return ()
                new.append(self._write(storage, self._advance(), Category.TEMPORARY, producer))
        return new

    def track_existing(self, tensor: torch.Tensor, category: Category) -> Sequence[StorageRecord]:
        """Write down storages that were live before the first event, unless they are tracked.

        Args:
            tensor: any tensor, of any shape and dtype.
            category: what they are used for, if they are new.

        Returns:
            The records of its storages, new or not.
        """
        entry = self.entry_of(tensor)
        if entry is not None:
            return (entry.record,)
        if tensor.device != self.device:
            return ()
        return [
            self._known(storage) or self._write(storage, FROM_THE_START, category, "")
            for storage in self._storages_of(tensor)
        ]

    def classify(self, tensor: torch.Tensor, category: Category, owner: str | None) -> None:
        """Say what a tensor, of any shape and dtype, is used for: one of :data:`TRAINING_STATE`.

        A temporary was on its way to this use since it was made. Anything else was used otherwise until now.
        ``owner`` is the path of the module that it belongs to, if it belongs to one.
        """
        entry = self.entry_of(tensor)
        if entry is not None:
            self._classify(entry, category, owner)
        elif tensor.device == self.device:
            for storage in self._storages_of(tensor):
                if self._known(storage) is None:
                    self._write(storage, FROM_THE_START, category, "")
                self._classify(self.live[storage_key(storage)], category, owner)

    def _classify(self, entry: StorageReference, category: Category, owner: str | None) -> None:
        record = entry.record
        if record.category is _TEMPORARY:
            record.category = category
        elif record.category is not category and record.category not in TRAINING_STATE:
            record = self._continue(entry)
            record.category = category
        if record.owner is None:
            record.owner = owner

    def track_before_resize(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Write down a storage that shows up by being resized, unless it is tracked.

        Args:
            storage: any storage; it was there before the first event.
            num_bytes: its size until now.
        """
        # The storage of a fake tensor is on `meta`, wherever the tensor says that it is.
        is_here = storage.device == self.device or (self.counts_fakes and storage.device.type == "meta")
        if storage_key(storage) not in self.live and is_here:
            self._write(storage, FROM_THE_START, Category.INPUTS, "", num_bytes)

    def resize(self, storage: torch.UntypedStorage, producer: str | None = None) -> None:
        """Write down that a storage has another size now, if it is tracked.

        Args:
            storage: any storage.
            producer: path of the module that resized it, if it is known. What it puts into a storage that was
                empty is made there, and no input any more.
        """
        entry = self.live.get(storage_key(storage))
        if entry is None:
            return
        record = self._continue(entry)
        if record.num_bytes == 0 and producer is not None and record.category in _THERE_BEFORE:
            record.category, record.producer = Category.TEMPORARY, producer
        if self.estimate is not None:
            self.estimate.free(record.num_bytes)
            self.estimate.allocate(storage.nbytes())
        self.live_bytes += storage.nbytes() - record.num_bytes
        record.num_bytes = storage.nbytes()

    def _storages_of(self, tensor: torch.Tensor) -> Sequence[torch.UntypedStorage]:
        if type(tensor) in PLAIN_TENSORS and tensor.layout is _STRIDED:  # saves a call for most tensors
            return (tensor.untyped_storage(),)
        storages = storages_of(tensor)
        if self.counts_fakes:
            return storages
        # A fake tensor says that it is on some device, but its storage is on `meta`.
        return [storage for storage in storages if storage.device.type == self.device.type]

    def _known(self, storage: torch.UntypedStorage) -> StorageRecord | None:
        """The record of a live storage, with its present size."""
        entry = self.live.get(storage_key(storage))
        if entry is None:
            return None
        if entry.record.num_bytes != storage.nbytes():
            self.resize(storage)
        return entry.record

    def _continue(self, entry: StorageReference) -> StorageRecord:
        """Close the record of a storage and open its next one, to be changed."""
        entry.record = entry.record.continued(self._advance())
        self.records.append(entry.record)
        return entry.record

    def _write(
        self,
        storage: torch.UntypedStorage,
        born: int,
        category: Category,
        producer: str,
        num_bytes: int | None = None,
    ) -> StorageRecord:
        if num_bytes is None:
            num_bytes = storage.nbytes()
        record = StorageRecord(num_bytes, born, category, producer)
        self.records.append(record)
        self.live_bytes += num_bytes
        if born == FROM_THE_START:
            self.late_bytes += num_bytes
        reference = StorageReference(storage, self._tell_freed)
        reference.key = key = storage_key(storage)
        reference.record = record
        self.live[key] = reference
        if self.estimate is not None:
            self.estimate.allocate(num_bytes, late=born == FROM_THE_START)
        return record

    def _advance(self) -> int:
        self.tick += 1
        return self.tick


def _tell_freed(weak_tracker: weakref.ref[StorageTracker], reference: StorageReference) -> None:
    tracker = weak_tracker()
    if tracker is None or not tracker.is_open:
        return
    if tracker.live.pop(reference.key, None) is None:
        return
    record = reference.record
    tracker.tick = record.died = tracker.tick + 1
    tracker.live_bytes -= record.num_bytes
    if tracker.estimate is not None:
        tracker.estimate.free(record.num_bytes)


skip_in_dynamo(_tell_freed)
