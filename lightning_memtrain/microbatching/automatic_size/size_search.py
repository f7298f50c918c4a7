"""Finding the largest chunks that fit, from the measured peaks of a few."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Peak(NamedTuple):
    """The forward and backward of a chunk.

    Args:
        size: its samples.
        num_bytes: most bytes that were live; ``None`` if it was given up, since they do not fit.
    """

    size: int
    num_bytes: int | None


# After so many tries by which the line has led astray, it is not asked again.
_MOST_ASTRAY = 4


def largest_fitting(
    measure: Callable[[int], Peak], batch_size: int, free_bytes: int, whole_spares_bytes: int = 0
) -> Peak:
    """Find the fewest chunks whose peak is within a limit, for any peaks that rise with the size.

    The peak is nearly a straight line in the number of samples. So chunks of two and of four samples say
    where to look; wherever the line turns out to be far off, the next try halves what is left. In the end
    the size that is taken and the next larger one have both been measured. Single samples are tried only
    at last: batch normalisation may need two.

    Args:
        measure: splits the batch into so many chunks of even size and measures the largest.
        batch_size: samples of the batch, at least 1.
        free_bytes: bytes that may be used in all.
        whole_spares_bytes: bytes that the whole batch does without, because no chunk before it has left
            gradients; so it may fit where smaller chunks do not. 0 if nothing is spared.

    Returns:
        The largest chunk that fits; one of a single sample even if that does not.

    Example:
        >>> def measure(num_chunks: int) -> Peak:
        ...     size = -(-100 // num_chunks)
        ...     return Peak(size, 1000 + 30 * size)
        >>> largest_fitting(measure, batch_size=100, free_bytes=2600)
        Peak(size=50, num_bytes=2500)
    """
    sizes = chunk_sizes(batch_size)
    last = len(sizes) - 1
    below: list[Peak] = []  # those that fit, by size
    above: Peak | None = None
    lowest, highest = -1, len(sizes)  # the largest that fits and the smallest that does not, by place

    def fits(place: int) -> bool:
        nonlocal lowest, highest, above
        peak = measure(-(-batch_size // sizes[place]))
        if peak.num_bytes is not None and peak.num_bytes <= free_bytes:
            lowest = place
            below.append(peak)
            return True
        highest, above = place, peak
        return False

    first = min(1, last)
    if not fits(first) and (first == 0 or not fits(0)):
        return Peak(1, above.num_bytes if above is not None else None)
    by_line, num_astray, tried_whole = True, 0, first == last
    while lowest + 1 < highest:
        left, has_line = highest - lowest, len(below) > 1 or above is not None
        target = _size_at(free_bytes, below, above) if has_line else 2 * below[0].size
        place = bisect_right(sizes, target) - 1 if by_line else (lowest + highest) // 2
        place = min(max(place, lowest + 1), highest - 1)
        tried_whole = tried_whole or place == last
        fits(place)
        astray = by_line and has_line and 2 * (highest - lowest) > left + 1
        num_astray += astray
        by_line = not astray and num_astray < _MOST_ASTRAY
    # Nearly a straight line, so what it says of the whole batch is good enough to decide on one more try.
    if not tried_whole and _size_at(free_bytes + whole_spares_bytes, below, above) >= batch_size:
        fits(last)
    return below[-1]


def chunk_sizes(batch_size: int) -> list[int]:
    """All sizes that the largest of evenly split chunks can have, rising.

    Args:
        batch_size: samples of the batch, at least 1.

    Returns:
        The sizes, from 1 to the whole batch.

    Example:
        >>> chunk_sizes(10)
        [1, 2, 3, 4, 5, 10]
    """
    sizes = [1]
    while sizes[-1] < batch_size:
        num_chunks = -(-batch_size // sizes[-1])
        sizes.append(-(-batch_size // (num_chunks - 1)))
    return sizes


def _size_at(num_bytes: int, below: Sequence[Peak], above: Peak | None) -> float:
    """The size at which the line through two peaks, those next to the limit, reaches some bytes."""
    peaks = [*below[-2:], *([above] if above is not None and above.num_bytes is not None else [])][-2:]
    if len(peaks) < 2:
        return float("inf")
    (one, one_bytes), (other, other_bytes) = peaks
    assert one_bytes is not None
    assert other_bytes is not None
    bytes_per_sample = (other_bytes - one_bytes) / (other - one)
    if bytes_per_sample <= 0:
        return float("inf")
    return one + (num_bytes - one_bytes) / bytes_per_sample
