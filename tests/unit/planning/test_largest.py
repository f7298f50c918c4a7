"""The largest number that fits is found with few questions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_memtrain.planning.prediction.largest import largest_that_fits


@pytest.mark.parametrize("first", [1, 8, 142, 143, 5000])
@pytest.mark.parametrize(
    "spare",
    [
        lambda num: 1000 - 7 * num,
        lambda num: 10_000 - 70 * num - num % 3,
        lambda num: 21 * 2 - num // 7 * 2 - 1,
        lambda num: 143 - num - 1,
    ],
    ids=["line", "rough line", "staircase", "exact"],
)
def test_one_more_would_be_too_many(spare: Callable[[int], int], first: int) -> None:
    asked: list[int] = []

    def counted(num: int) -> int:
        asked.append(num)
        return spare(num)

    found = largest_that_fits(counted, first)
    assert spare(found) >= 0 > spare(found + 1)
    assert len(set(asked)) == len(asked) <= 16


def test_none_fits() -> None:
    assert largest_that_fits(lambda num: -num, 16) == 0


def test_what_never_ends_is_ended() -> None:
    assert largest_that_fits(lambda num: 1, 3, most=100) == 100
