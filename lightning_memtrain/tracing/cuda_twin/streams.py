"""Streams of the twin: everything is done at once, but each stream has blocks of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DEFAULT = 0
#: CUDA's streams of one priority come from a pool of this many, one after the other, and around again.
_POOL = 32


class Stream:
    """One of the device's streams.

    Args:
        device: is the twin.
        priority: below 0 for a pool of its own.
    """

    _numbers = itertools.count()

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        number = next(self._numbers) % _POOL
        self.number = _DEFAULT + 1 + number + (_POOL if priority < 0 else 0)
        """What its blocks are known by; 0 is the stream that one is on."""

    @classmethod
    def default(cls) -> Stream:
        """The one that everything runs on unless told otherwise."""
        stream = cls.__new__(cls)
        stream.number = _DEFAULT
        return stream

    def record_event(self, event: Any = None) -> Any:
        """An event of what was done so far, which is everything.

        Args:
            event: one to take; ``None`` for a new one.

        Returns:
            The event.
        """
        return Event() if event is None else event

    def wait_event(self, event: Any) -> None:
        """There is nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """There is nothing to wait for."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def __eq__(self, other: object) -> bool:
        """Whether it is the same stream."""
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        """By its number."""
        return self.number


class Event:
    """Something that has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> Event:
        """It happens.

        Args:
            stream: where; any.

        Returns:
            The event.
        """
        return self

    def wait(self, stream: Any = None) -> None:
        """There is nothing to wait for."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """No time passes here."""
        return 0.0


class Streams:
    """Which stream is the current one."""

    def __init__(self) -> None:
        self.current = Stream.default()
        """The one that allocations are for."""

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Be on a stream for a while.

        Args:
            stream: any; ``None`` changes nothing.

        Yields:
            Nothing.
        """
        before = self.current
        self.current = stream if isinstance(stream, Stream) else before
        try:
            yield
        finally:
            self.current = before
