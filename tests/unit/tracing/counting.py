"""A user's module whose functions and classes keep state, for the tests beside it."""

from __future__ import annotations

from typing import ClassVar

NUM = 0
SEEN: list[int] = []
_LAZY = None


class Registry:
    entries: ClassVar[dict[str, int]] = {}
    num = 0

    @classmethod
    def register(cls, name: str) -> None:
        cls.num += 1
        cls.entries[name] = cls.num


def count(value: int) -> None:
    global NUM
    NUM += 1
    SEEN.append(value)


def table() -> list[int]:
    global _LAZY
    if _LAZY is None:
        _LAZY = [1, 2, 3]
    return _LAZY
