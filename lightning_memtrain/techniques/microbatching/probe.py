"""Finding the largest chunks that fit, from the measured peaks of a few."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Peak(NamedTuple):
    """The forward and backward of a chunk.

    Args:
        size: its samples.
        num_bytes: most bytes that were live; ``None`` if memory ran out.
    """

    size: int
    num_bytes: int | None


def largest_fitting(measure: Callable[[int], Peak], batch_size: int, free_bytes: int) -> Peak:
    """Find the fewest chunks whose peak is within a limit.

    The peak is nearly a straight line in the number of samples, bent slightly upwards. So chunks of two and
    of four samples say where to look; the candidate itself is measured, and where it does not fit the line
    is drawn again. Single samples are tried only at last: batch normalisation may need two.

    Args:
        measure: splits the batch into so many chunks of even size and measures the largest.
        batch_size: samples of the batch, at least 1.
        free_bytes: bytes that may be used in all.

    Returns:
        The largest chunk that fits; one of a single sample even if that does not.

    Example:
        >>> def measure(num_chunks: int) -> Peak:
        ...     size = -(-100 // num_chunks)
        ...     return Peak(size, 1000 + 30 * size)
        >>> largest_fitting(measure, batch_size=100, free_bytes=2600)
        Peak(size=50, num_bytes=2500)
    """

    def num_chunks(size: int) -> int:
        return -(-batch_size // size)

    fitting, below, failing = None, None, None
    count = num_chunks(min(2, batch_size))
    while True:
        peak = measure(count)
        if peak.num_bytes is not None and peak.num_bytes <= free_bytes:
            below, fitting = fitting, peak
        else:
            failing = peak
        if fitting is None:
            assert failing is not None
            if failing.size == 1:
                return failing
            count = num_chunks(failing.size // 2)
            continue
        fewer = num_chunks(fitting.size) - 1  # the next larger chunks that there are
        fewest = 1 if failing is None else num_chunks(failing.size - 1)
        if fewer < fewest:
            return fitting
        other = failing if failing is not None and failing.num_bytes is not None else below
        if other is None or (failing is not None and failing.num_bytes is None):
            target = 2 * fitting.size if failing is None else (fitting.size + failing.size) // 2
        else:
            size_at_limit = _where_the_line_meets(fitting, other, free_bytes)
            if failing is None and fewer > 1 and size_at_limit < -(-batch_size // fewer):
                # The peak is above the line, so what does not fit on it does not fit at all; except the whole
                # batch, which may lie below, since no chunk before it has left gradients.
                return fitting
            target = int(min(size_at_limit, batch_size))
        count = min(max(num_chunks(max(target, 1)), fewest), fewer)


def _where_the_line_meets(one: Peak, other: Peak, free_bytes: int) -> float:
    """The size at which the line through two peaks reaches a limit."""
    assert one.num_bytes is not None
    assert other.num_bytes is not None
    bytes_per_sample = (other.num_bytes - one.num_bytes) / (other.size - one.size)
    if bytes_per_sample <= 0:
        return float("inf")
    return one.size + (free_bytes - one.num_bytes) / bytes_per_sample
