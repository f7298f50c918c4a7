"""Iterators that have no way back: in their places new ones are put that begin where they stood."""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Iterable
from typing import Any

from lightning_memtrain.tracing.user_state.object_snapshots import Snapshot

OVER_SEQUENCES: tuple[type, ...] = tuple(
    type(iterator) for iterator in (iter([]), iter(()), iter(""), iter(b""), iter(range(0)), reversed([]))
)
"""Types of iterators that tell where they stand in what they go over."""


class IteratorSnapshots:
    """Counters and iterators over sequences, and where they are held.

    One that has moved is replaced wherever a captured object holds it. Others cannot be put back: generators,
    and what :mod:`itertools` makes of other iterators.
    """

    def __init__(self) -> None:
        self._captured: list[tuple[Any, Any]] = []
        self._index: dict[int, int] = {}
        self._places: list[tuple[Any, Any, int]] = []

    def add(self, target: Any) -> list[Any]:
        """Note one more iterator.

        Args:
            target: the iterator.

        Returns:
            What it goes over.
        """
        template = _Count(target) if type(target) is itertools.count else copy.copy(target)
        self._index[id(target)] = len(self._captured)
        self._captured.append((target, template))
        return [] if type(target) is itertools.count else [target.__reduce__()[1][0]]

    def locate(self, snapshots: Iterable[Snapshot]) -> None:
        """Find the places where the iterators are held.

        Args:
            snapshots: of all objects that may hold one.
        """
        if not self._index:
            return
        for snapshot in snapshots:
            contents = getattr(snapshot, "contents", ())
            for key, value in contents.items() if type(contents) is dict else enumerate(contents):
                index = self._index.get(id(value))
                if index is not None:
                    self._places.append((contents, key, index))

    def restore(self) -> None:
        """Let the other snapshots put back what has not moved, or a new one; so this comes before them."""
        now = [_unmoved_or_new(target, template) for target, template in self._captured]
        for contents, key, index in self._places:
            contents[key] = now[index]


def _unmoved_or_new(target: Any, template: Any) -> Any:
    return target if _place(target) == _place(template) else copy.copy(template)


def _place(iterator: Any) -> Any:
    if isinstance(iterator, (_Count, itertools.count)):
        return repr(iterator)
    return iterator.__reduce__()[2:]  # none at its end


class _Count:
    """Makes counters that begin where one stood; only their texts tell that in every Python."""

    def __init__(self, target: itertools.count[Any]) -> None:
        self._text = repr(target)
        self._arguments = ast.literal_eval(f"({self._text.removeprefix('count(').removesuffix(')')},)")

    def __repr__(self) -> str:
        return self._text

    def __copy__(self) -> itertools.count[Any]:
        return itertools.count(*self._arguments)
