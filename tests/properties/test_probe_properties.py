"""The probe finds the largest chunks that fit, whatever the peaks are, as long as they bend upwards."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_memtrain.techniques.microbatching.probe import Peak, largest_fitting


@given(
    batch_size=st.integers(1, 300),
    base=st.integers(0, 5_000),
    slope=st.integers(1, 100),
    bend=st.floats(0, 0.5),
    free_bytes=st.integers(100, 40_000),
    most=st.none() | st.integers(1, 400),
)
def test_the_largest_chunks_that_fit_are_found(
    batch_size: int, base: int, slope: int, bend: float, free_bytes: int, most: int | None
) -> None:
    num_measured = 0

    def peak_bytes(size: int) -> int:
        return base + slope * size + int(bend * size**2)

    def measure(num_chunks: int) -> Peak:
        nonlocal num_measured
        num_measured += 1
        size = -(-batch_size // num_chunks)
        return Peak(size, peak_bytes(size) if most is None or size <= most else None)

    sizes = {-(-batch_size // count) for count in range(1, batch_size + 1)}
    fitting = [size for size in sizes if peak_bytes(size) <= free_bytes and (most is None or size <= most)]
    assert largest_fitting(measure, batch_size, free_bytes).size == max(fitting, default=1)
    assert num_measured <= 20


def test_a_straight_line_takes_three_measurements() -> None:
    counts = []

    def measure(num_chunks: int) -> Peak:
        counts.append(num_chunks)
        size = -(-100 // num_chunks)
        return Peak(size, 1_000 + 30 * size)

    assert largest_fitting(measure, 100, 1_000 + 30 * 25) == Peak(25, 1_750)
    assert counts == [50, 25, 4]
