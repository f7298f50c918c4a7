"""Other tensors in the place of some, wherever those are held within reach."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import CellType
from typing import Any

from torch import Tensor

from lightning_memtrain.tracing.user_state.object_snapshots import (
    ABSENT,
    CellSnapshot,
    ClassSnapshot,
    DequeSnapshot,
    DictSnapshot,
    ListSnapshot,
    NamespaceSnapshot,
    OrderedDictSnapshot,
    SetSnapshot,
    SlotsSnapshot,
    Snapshot,
)

Swap = Callable[[Any], Any]


def replace_tensors(snapshots: Iterable[Snapshot], others: Mapping[int, Tensor]) -> None:
    """Let everything that is captured hold other tensors; restoring the snapshots takes it back.

    Args:
        snapshots: of what is within reach.
        others: what to put in the place of a tensor, by its ``id``; of any shape and dtype.
    """

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return others.get(id(value), value)
        if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make")):
            return _swapped_tuple(value, swap)
        return value

    for snapshot in snapshots:
        put = _PUT.get(type(snapshot))
        if put is not None:
            with suppress(Exception):  # what refuses to be written is passed over
                put(snapshot, swap)


def _swapped_tuple(value: tuple[Any, ...], swap: Swap) -> tuple[Any, ...]:
    items = [*tuple.__iter__(value)]
    swapped = [swap(item) for item in items]
    if all(one is other for one, other in zip(items, swapped, strict=True)):
        return value
    return value._make(swapped) if hasattr(value, "_make") else tuple(swapped)


def _in_dict(snapshot: Any, swap: Swap) -> None:
    target: dict[Any, Any] = snapshot.target
    items = [*dict.items(target)]
    if any(isinstance(key, (Tensor, tuple)) and swap(key) is not key for key, _ in items):  # optimizer state
        dict.clear(target)
        dict.update(target, {swap(key): swap(value) for key, value in items})
        return
    for key, value in items:
        if swap(value) is not value:
            dict.__setitem__(target, key, swap(value))


def _in_ordered_dict(snapshot: Any, swap: Swap) -> None:
    target: OrderedDict[Any, Any] = snapshot.target
    for key, value in [*OrderedDict.items(target)]:
        if swap(value) is not value:
            OrderedDict.__setitem__(target, key, swap(value))


def _in_list(snapshot: Any, swap: Swap) -> None:
    target: list[Any] = snapshot.target
    for place, value in enumerate([*list.__iter__(target)]):
        if swap(value) is not value:
            list.__setitem__(target, place, swap(value))


def _in_deque(snapshot: Any, swap: Swap) -> None:
    target: deque[Any] = snapshot.target
    for place, value in enumerate([*deque.__iter__(target)]):
        if swap(value) is not value:
            deque.__setitem__(target, place, swap(value))


def _in_set(snapshot: Any, swap: Swap) -> None:
    target: set[Any] = snapshot.target
    for value in [*set.__iter__(target)]:
        if swap(value) is not value:
            set.discard(target, value)
            set.add(target, swap(value))


def _in_cell(snapshot: Any, swap: Swap) -> None:
    target: CellType = snapshot.target
    (value,) = snapshot.contents
    if value is not ABSENT and swap(value) is not value:
        target.cell_contents = swap(value)


def _in_names(snapshot: Any, swap: Swap) -> None:
    for name, value in snapshot.contents.items():
        if value is not ABSENT and swap(value) is not value:
            snapshot.target[name] = swap(value)


def _in_slots(snapshot: Any, swap: Swap) -> None:
    for slot, value in zip(snapshot.slots, snapshot.contents, strict=True):
        if value is not ABSENT and swap(value) is not value:
            slot.__set__(snapshot.target, swap(value))


def _in_class(snapshot: Any, swap: Swap) -> None:
    for name, value in snapshot.contents.items():
        if swap(value) is not value:
            type.__setattr__(snapshot.target, name, swap(value))


_PUT: dict[type, Callable[[Any, Swap], None]] = {
    DictSnapshot: _in_dict,
    OrderedDictSnapshot: _in_ordered_dict,
    ListSnapshot: _in_list,
    DequeSnapshot: _in_deque,
    SetSnapshot: _in_set,
    CellSnapshot: _in_cell,
    NamespaceSnapshot: _in_names,
    SlotsSnapshot: _in_slots,
    ClassSnapshot: _in_class,
}
