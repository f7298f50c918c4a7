"""What one object holds, captured so that it can be put back: one small class for each kind of object.

Contents are read and written by the methods of the built-in types, so that those that a subclass overrides
are neither called nor in the way. Nothing is written where nothing has changed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from contextlib import suppress
from operator import is_
from types import CellType, FunctionType, ModuleType
from typing import Any, Protocol

from lightning_memtrain.tracing.user_state.boundaries import own_of

ABSENT: Any = object()
"""What a place holds that holds nothing."""


class Snapshot(Protocol):
    """What something held when it was captured."""

    def restore(self) -> None:
        """Put back what was held; may be called several times."""


class DictSnapshot:
    """Keys, values and order of a dictionary.

    Args:
        target: the dictionary.
    """

    __slots__ = ("contents", "target")

    def __init__(self, target: dict[Any, Any]) -> None:
        self.target = target
        self.contents: dict[Any, Any] = dict.copy(target)

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        target, contents = self.target, self.contents
        if self._is_unchanged():
            return
        if all(type(key) is str for key in (*dict.keys(target), *contents)):
            for name in [name for name in dict.keys(target) if name not in contents]:
                dict.__delitem__(target, name)
            for name, value in contents.items():
                if dict.get(target, name, ABSENT) is not value:
                    dict.__setitem__(target, name, value)
            if self._is_unchanged():
                return
        # Between dictionaries the hashes are taken over, so that no key is asked for its own.
        dict.clear(target)
        dict.update(target, contents)

    def _is_unchanged(self) -> bool:
        target, contents = self.target, self.contents
        return (
            dict.__len__(target) == len(contents)
            and all(map(is_, dict.keys(target), contents))
            and all(map(is_, dict.values(target), contents.values()))
        )


class OrderedDictSnapshot:
    """As :class:`DictSnapshot`, of a dictionary that keeps its order apart.

    Args:
        target: the dictionary.
    """

    __slots__ = ("contents", "keys", "target")

    def __init__(self, target: OrderedDict[Any, Any]) -> None:
        self.target = target
        self.keys = [*OrderedDict.keys(target)]
        self.contents = [*OrderedDict.values(target)]

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        target = self.target
        if (
            dict.__len__(target) == len(self.keys)
            and all(map(is_, OrderedDict.keys(target), self.keys))
            and all(map(is_, OrderedDict.values(target), self.contents))
        ):
            return
        OrderedDict.clear(target)
        for key, value in zip(self.keys, self.contents, strict=True):
            OrderedDict.__setitem__(target, key, value)


class EmptySnapshots:
    """Dictionaries without anything in them."""

    def __init__(self) -> None:
        self.dicts: list[dict[Any, Any]] = []
        self.ordered: list[OrderedDict[Any, Any]] = []

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        for target in self.dicts:
            if dict.__len__(target):
                dict.clear(target)
        for target in self.ordered:
            if dict.__len__(target):
                OrderedDict.clear(target)


class ListSnapshot:
    """The items of a list.

    Args:
        target: the list.
    """

    __slots__ = ("contents", "target")

    def __init__(self, target: list[Any]) -> None:
        self.target = target
        self.contents: list[Any] = list.copy(target)

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        target, contents = self.target, self.contents
        if list.__len__(target) != len(contents) or not all(map(is_, list.__iter__(target), contents)):
            list.__setitem__(target, slice(None), contents)


class DequeSnapshot:
    """The items of a double-ended queue.

    Args:
        target: the queue.
    """

    __slots__ = ("contents", "target")

    def __init__(self, target: deque[Any]) -> None:
        self.target = target
        self.contents: list[Any] = [*deque.__iter__(target)]

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        target, contents = self.target, self.contents
        if deque.__len__(target) != len(contents) or not all(map(is_, deque.__iter__(target), contents)):
            deque.clear(target)
            deque.extend(target, contents)


class SetSnapshot:
    """The items of a set.

    Args:
        target: the set.
    """

    __slots__ = ("_items", "contents", "target")

    def __init__(self, target: set[Any]) -> None:
        self.target = target
        self.contents: list[Any] = [*set.__iter__(target)]
        self._items = set().union(target)  # takes the hashes over

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        target = self.target
        if set.__len__(target) != len(self.contents) or not all(
            map(is_, set.__iter__(target), self.contents)
        ):
            set.clear(target)
            set.update(target, self._items)


class CellSnapshot:
    """What a variable holds that functions share.

    Args:
        target: its cell.
    """

    __slots__ = ("contents", "target")

    def __init__(self, target: CellType) -> None:
        self.target = target
        try:
            self.contents = [target.cell_contents]
        except ValueError:  # not assigned yet
            self.contents = [ABSENT]

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        (value,) = self.contents
        if value is not ABSENT:
            self.target.cell_contents = value
            return
        with suppress(ValueError):
            del self.target.cell_contents


class FunctionSnapshot:
    """The defaults of a function.

    Args:
        target: the function.
    """

    __slots__ = ("_defaults", "target")

    def __init__(self, target: FunctionType) -> None:
        self.target = target
        self._defaults = target.__defaults__, target.__kwdefaults__

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        positional, by_name = self._defaults
        if self.target.__defaults__ is not positional:
            self.target.__defaults__ = positional
        if self.target.__kwdefaults__ is not by_name:
            self.target.__kwdefaults__ = by_name


class NamespaceSnapshot:
    """Some names of a namespace that others share, such as the globals of a module.

    Args:
        target: the namespace.
    """

    __slots__ = ("contents", "target")

    def __init__(self, target: dict[str, Any]) -> None:
        self.target = target
        self.contents: dict[str, Any] = {}

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        target = self.target
        for name, value in self.contents.items():
            now = target.get(name, ABSENT)
            if now is value:
                continue
            if value is not ABSENT:
                target[name] = value
            elif now is not ABSENT and type(now) is not ModuleType:
                # A module that was imported meanwhile stays: `sys.modules` would not let it be set again.
                del target[name]


class SlotsSnapshot:
    """What the places hold that ``__slots__`` makes.

    Args:
        target: the object.
        slots: the descriptors of its classes.
    """

    __slots__ = ("contents", "slots", "target")

    def __init__(self, target: Any, slots: tuple[Any, ...]) -> None:
        self.target = target
        self.slots = slots
        self.contents = [self._get(slot) for slot in slots]

    def _get(self, slot: Any) -> Any:
        try:
            return slot.__get__(self.target)
        except AttributeError:
            return ABSENT

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        for slot, value in zip(self.slots, self.contents, strict=True):
            if self._get(slot) is value:
                continue
            if value is ABSENT:
                slot.__delete__(self.target)
            else:
                slot.__set__(self.target, value)


class ClassSnapshot:
    """The attributes of a class.

    Args:
        target: the class.
    """

    __slots__ = ("contents", "target")

    def __init__(self, target: type) -> None:
        self.target = target
        self.contents = self._now()

    def _now(self) -> dict[str, Any]:
        return dict(own_of(self.target))

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        now = self._now()
        for name in now.keys() - self.contents.keys():
            if not _is_special(name):
                type.__delattr__(self.target, name)
        for name, value in self.contents.items():
            if now.get(name, ABSENT) is not value and not _is_special(name):
                type.__setattr__(self.target, name, value)


def _is_special(name: str) -> bool:
    # Python's own, some of which change when they are asked for.
    return name.startswith("__") and name.endswith("__") and name not in ("__call__",)


class InstanceSnapshots:
    """Classes of objects, and which dictionary holds their attributes."""

    def __init__(self) -> None:
        self._captured: list[tuple[Any, type, Any, Any]] = []

    def add(self, target: Any, attributes: dict[str, Any] | None, accessor: Any) -> None:
        """Note one more object."""
        self._captured.append((target, type(target), attributes, accessor))

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        for target, cls, attributes, accessor in self._captured:
            if type(target) is not cls:
                with suppress(Exception):
                    object.__setattr__(target, "__class__", cls)
            if accessor is not None and accessor.__get__(target) is not attributes:
                with suppress(Exception):
                    accessor.__set__(target, attributes)
