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
    CellNote,
    ClassNote,
    DequeNote,
    DictNote,
    ListNote,
    NamesNote,
    Note,
    OrderedDictNote,
    SetNote,
    SlotsNote,
)

Swap = Callable[[Any], Any]


def replace(notes: Iterable[Note], others: Mapping[int, Tensor]) -> None:
    """Let everything that is noted hold other tensors; restoring the notes takes it back.

    Args:
        notes: of what is within reach.
        others: what to put in the place of a tensor, by its ``id``.
    """

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return others.get(id(value), value)
        if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make")):
            return _swapped_tuple(value, swap)
        return value

    for note in notes:
        put = _PUT.get(type(note))
        if put is not None:
            with suppress(Exception):  # what refuses to be written is passed over
                put(note, swap)


def _swapped_tuple(value: tuple[Any, ...], swap: Swap) -> tuple[Any, ...]:
    items = [*tuple.__iter__(value)]
    swapped = [swap(item) for item in items]
    if all(one is other for one, other in zip(items, swapped, strict=True)):
        return value
    return value._make(swapped) if hasattr(value, "_make") else tuple(swapped)


def _in_dict(note: Any, swap: Swap) -> None:
    target: dict[Any, Any] = note.target
    items = [*dict.items(target)]
    if any(isinstance(key, (Tensor, tuple)) and swap(key) is not key for key, _ in items):  # optimizer state
        dict.clear(target)
        dict.update(target, {swap(key): swap(value) for key, value in items})
        return
    for key, value in items:
        if swap(value) is not value:
            dict.__setitem__(target, key, swap(value))


def _in_ordered_dict(note: Any, swap: Swap) -> None:
    target: OrderedDict[Any, Any] = note.target
    for key, value in [*OrderedDict.items(target)]:
        if swap(value) is not value:
            OrderedDict.__setitem__(target, key, swap(value))


def _in_list(note: Any, swap: Swap) -> None:
    target: list[Any] = note.target
    for place, value in enumerate([*list.__iter__(target)]):
        if swap(value) is not value:
            list.__setitem__(target, place, swap(value))


def _in_deque(note: Any, swap: Swap) -> None:
    target: deque[Any] = note.target
    for place, value in enumerate([*deque.__iter__(target)]):
        if swap(value) is not value:
            deque.__setitem__(target, place, swap(value))


def _in_set(note: Any, swap: Swap) -> None:
    target: set[Any] = note.target
    for value in [*set.__iter__(target)]:
        if swap(value) is not value:
            set.discard(target, value)
            set.add(target, swap(value))


def _in_cell(note: Any, swap: Swap) -> None:
    target: CellType = note.target
    (value,) = note.contents
    if value is not ABSENT and swap(value) is not value:
        target.cell_contents = swap(value)


def _in_names(note: Any, swap: Swap) -> None:
    for name, value in note.contents.items():
        if value is not ABSENT and swap(value) is not value:
            note.target[name] = swap(value)


def _in_slots(note: Any, swap: Swap) -> None:
    for slot, value in zip(note.slots, note.contents, strict=True):
        if value is not ABSENT and swap(value) is not value:
            slot.__set__(note.target, swap(value))


def _in_class(note: Any, swap: Swap) -> None:
    for name, value in note.contents.items():
        if swap(value) is not value:
            type.__setattr__(note.target, name, swap(value))


_PUT: dict[type, Callable[[Any, Swap], None]] = {
    DictNote: _in_dict,
    OrderedDictNote: _in_ordered_dict,
    ListNote: _in_list,
    DequeNote: _in_deque,
    SetNote: _in_set,
    CellNote: _in_cell,
    NamesNote: _in_names,
    SlotsNote: _in_slots,
    ClassNote: _in_class,
}
