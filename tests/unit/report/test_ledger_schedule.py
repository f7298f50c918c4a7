from __future__ import annotations

import re

import numpy
import pytest

from lightning_memtrain.report import MemoryProfiler
from lightning_memtrain.report.ledger_schedule import LedgerSchedule


@pytest.mark.parametrize(
    ("every_n_steps", "watched"),
    [(1, list(range(12))), (2, [0, 1, 2, 4, 6, 8, 10]), (5, [0, 1, 2, 5, 10]), (100, [0, 1, 2])],
)
def test_first_three_steps_then_every_nth(every_n_steps: int, watched: list[int]):
    schedule = LedgerSchedule(every_n_steps)
    assert [step for step in range(12) if schedule.watches(step)] == watched


@pytest.mark.parametrize("wrong", [0, -1, -50])
def test_below_one_is_refused(wrong: int):
    message = (
        "`MemoryProfiler(every_n_steps)` must be an integer of at least 1, "
        f"but got every_n_steps={wrong}. Use 1 to let the ledger watch every step"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        MemoryProfiler(every_n_steps=wrong)


@pytest.mark.parametrize("wrong", [True, False, 2.0, "50", None])
def test_another_type_is_refused(wrong: object):
    message = (
        "`MemoryProfiler(every_n_steps)` must be an integer of at least 1, "
        f"but got every_n_steps={wrong!r}. Use 1 to let the ledger watch every step"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        MemoryProfiler(every_n_steps=wrong)


def test_any_integer_type_is_taken():
    assert MemoryProfiler(every_n_steps=numpy.int64(7)).every_n_steps == 7
