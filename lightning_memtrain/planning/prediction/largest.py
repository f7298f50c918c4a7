"""The largest number of something that leaves room."""

from __future__ import annotations

from collections.abc import Callable


def largest_that_fits(spare: Callable[[int], int], first: int, most: int = 2**20) -> int:
    """Find the largest number for which something is left.

    What is left is taken to grow smaller with the number; about evenly, so that the next number to try is
    where the line through two others reaches nothing. Where that does not lead on, the middle is tried.

    Args:
        spare: what is left at a number of at least 1; negative if it is too much.
        first: the number to begin with, at least 1.
        most: where to stop.

    Returns:
        The number, at most ``most``; 0 if 1 is too much.

    Example:
        >>> largest_that_fits(lambda num: 1000 - 7 * num, first=8)
        142
    """
    known = {first: spare(first)}
    fits, too_many = (first, None) if known[first] >= 0 else (0, first)
    while too_many is None or too_many - fits > 1:
        if too_many is None:
            if fits >= most:
                return most
            number = min(most, max(2 * fits, _crossing(known) or 0))
        else:
            middle = (fits + too_many) // 2
            line = _crossing(known) if len(known) < 5 else None  # a step in a staircase deceives the line
            number = middle if line is None else min(max(line, fits + 1), too_many - 1)
        known[number] = spare(number)
        if known[number] >= 0:
            fits = number
        else:
            too_many = number
    return fits


def _crossing(known: dict[int, int]) -> int | None:
    """Where the line through the two numbers nearest to nothing left reaches it; ``None`` if it does not."""
    if len(known) < 2:
        return None
    one, other = sorted(known, key=lambda number: abs(known[number]))[:2]
    slope = (known[one] - known[other]) / (one - other)
    return int(one - known[one] / slope) if slope < 0 else None
