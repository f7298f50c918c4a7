"""The probe finds the largest chunks that fit, whatever the peaks are, as long as they rise with the size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_memtrain.microbatching.automatic_size.size_search import Peak, chunk_sizes, largest_fitting

MOST_MEASUREMENTS = 20


def checked(batch_size: int, num_bytes: Callable[[int], int], free_bytes: int, *, aborts: bool) -> list[int]:
    """The sizes that were measured, in order, once it is sure that the right one was found."""
    measured = []

    def measure(num_chunks: int) -> Peak:
        size = -(-batch_size // num_chunks)
        measured.append(size)
        fits = num_bytes(size) <= free_bytes
        return Peak(size, None if aborts and not fits else num_bytes(size))

    sizes = {-(-batch_size // count) for count in range(1, batch_size + 1)}
    fitting = [size for size in sizes if num_bytes(size) <= free_bytes]
    found = largest_fitting(measure, batch_size, free_bytes)
    assert found.size == max(fitting, default=1)
    assert found.num_bytes == (None if aborts and not fitting else num_bytes(found.size))
    assert len(measured) == len(set(measured)) <= MOST_MEASUREMENTS
    return measured


@given(
    batch_size=st.integers(1, 300),
    base=st.integers(0, 5_000),
    slope=st.integers(1, 100),
    bend=st.floats(0, 0.5),
    free_bytes=st.integers(100, 40_000),
    aborts=st.booleans(),
)
@example(batch_size=13, base=94, slope=1, bend=0.0625, free_bytes=100, aborts=False)
def test_the_largest_chunks_that_fit_are_found(
    batch_size: int, base: int, slope: int, bend: float, free_bytes: int, aborts: bool
) -> None:
    checked(batch_size, lambda size: base + slope * size + int(bend * size**2), free_bytes, aborts=aborts)


@given(data=st.data(), batch_size=st.integers(1, 300), aborts=st.booleans())
def test_any_peaks_that_rise_will_do(data: st.DataObject, batch_size: int, aborts: bool) -> None:
    """Also those that jump, bend downwards or stay the same for a while."""
    sizes = chunk_sizes(batch_size)
    rises = data.draw(st.lists(st.integers(0, 1_000), min_size=len(sizes), max_size=len(sizes)))
    peaks = {size: sum(rises[: place + 1]) for place, size in enumerate(sizes)}
    free_bytes = data.draw(st.integers(0, peaks[batch_size] + 1))
    checked(batch_size, peaks.__getitem__, free_bytes, aborts=aborts)


@pytest.mark.parametrize("aborts", [True, False])
@pytest.mark.parametrize("most", [1, 2, 3, 999, 1_000, 1_001, 30_000, 333_334, 500_000, 1_000_000])
def test_a_batch_of_a_million_takes_no_more_measurements(most: int, aborts: bool) -> None:
    # The line is of no use: each size takes as much as the next, until one takes more than there is.
    checked(10**6, lambda size: 1 if size <= most else 3, 2, aborts=aborts)
    checked(10**6, lambda size: size**3, most**3, aborts=aborts)


@given(batch_size=st.integers(1, 3_000))
def test_sizes_are_those_that_chunks_can_have(batch_size: int) -> None:
    assert chunk_sizes(batch_size) == sorted({-(-batch_size // n) for n in range(1, batch_size + 1)})


@pytest.mark.parametrize("aborts", [True, False])
def test_a_straight_line_takes_four_measurements(aborts: bool) -> None:
    measured = checked(100, lambda size: 1_000 + 30 * size, 1_000 + 30 * 25, aborts=aborts)
    assert measured == [2, 4, 25, 34]  # the last shows that the one before is the largest


def test_a_batch_that_fits_takes_three_measurements() -> None:
    assert checked(100, lambda size: 1_000 + 30 * size, 5_000, aborts=True) == [2, 4, 100]


def test_the_whole_batch_may_fit_where_its_half_does_not() -> None:
    """Chunks of 50 find the gradients of those before, 400 bytes; the whole batch finds none."""

    def measure(num_chunks: int) -> Peak:
        size = -(-100 // num_chunks)
        num_bytes = 10 * size + (400 if num_chunks > 1 else 0)
        return Peak(size, num_bytes if num_bytes <= free_bytes else None)

    for free_bytes, size in ((1_000, 100), (999, 50), (899, 34), (740, 34)):
        assert largest_fitting(measure, 100, free_bytes, whole_spares_bytes=400).size == size
    free_bytes = 800
    assert largest_fitting(measure, 100, free_bytes).size == 34
