"""When patterns change."""

from __future__ import annotations

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.sparsity.methods.update_schedules import RunLength, UpdateEvery, UpdatePiecewise


def due(clock: UpdateEvery | UpdatePiecewise, run: RunLength, until: int = 1000) -> list[int]:
    update_steps = clock.in_steps(run)
    return [step for step in range(until) if update_steps.is_due(step)]


def test_fractions_are_of_the_run() -> None:
    assert due(UpdateEvery(10, start=0.25, stop=0.5), RunLength(100)) == [25, 35, 45]
    assert due(UpdateEvery(10, start=20, stop=40), RunLength(None)) == [20, 30, 40]


def test_whole_numbers_are_steps_or_epochs_also_where_they_are_1() -> None:
    assert due(UpdateEvery(40, start=1, stop=1.0), RunLength(100)) == [1, 41, 81]
    assert due(UpdatePiecewise({0: 2}, stop=1), RunLength(100, steps_per_epoch=6)) == [2, 4, 6]
    assert due(UpdatePiecewise({0: 1}, unit="step", stop=1), RunLength(100)) == [1]


def test_the_start_of_training_is_never_due() -> None:
    assert due(UpdateEvery(1, stop=2), RunLength(10)) == [1, 2]


def test_the_intervals_of_the_authors_of_dsr() -> None:
    clock = UpdatePiecewise({0: 100, 25: 200, 80: 400, 140: 800}, "epoch", stop=190)
    found = due(clock, RunLength(total_steps=100_000, steps_per_epoch=500), until=100_001)
    assert len(found) == 124 + 138 + 75 + 32
    assert found[0] == 100
    assert found[-1] == 140 * 500 + 31 * 800


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: UpdateEvery(0),
            r"`UpdateEvery\(steps\)` must have a number of steps .* at least 1, but got 0",
        ),
        (lambda: UpdateEvery(10, stop=1.5), r"fraction of the run as a float in \[0, 1\], but got 1\.5"),
        (lambda: UpdateEvery(10, start=-1), r"`UpdateEvery\(start\)`"),
        (lambda: UpdateEvery(10, start=9, stop=5), "must not be before start=9, but got stop=5"),
        (
            lambda: UpdateEvery(10).in_steps(RunLength()),
            r"the fraction 0\.75 of the run, .* this one has no end",
        ),
        (
            lambda: UpdateEvery(10, stop=1),
            r"`UpdateEvery\(stop\)` must be at least 2 .* since 1\.0 is the end of the run, but got stop=1\.",
        ),
        (
            lambda: UpdateEvery(10, start=1.0),
            r"must be below 1 .* but got start=1\.0\. Write 1 for",
        ),
        (
            lambda: UpdatePiecewise({0: 5}, stop=1.0),
            r"1 is the beginning of epoch 1, but got stop=1\.0",
        ),
        (lambda: UpdateEvery(10, stop=True), r"`UpdateEvery\(stop\)` must be .* but got True"),
        (lambda: UpdatePiecewise({}), r"Write e\.g\. \{0: 100, 25: 200\}"),
        (lambda: UpdatePiecewise({0: 0}), r"at least 1, but got 0"),
        (lambda: UpdatePiecewise({0: 5}, unit="day"), "'step' or 'epoch', but got unit='day'"),
        (lambda: UpdatePiecewise({0: 5}).in_steps(RunLength(10)), r"epochs of a known length"),
    ],
)
def test_what_cannot_work_is_refused(make: object, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()
