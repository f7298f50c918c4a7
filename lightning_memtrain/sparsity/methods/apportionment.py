"""A number divided among several, exactly."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_memtrain.core import ArgumentError


def apportion(total: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Divide a number in proportion to weights, with upper limits, exactly.

    What a full one cannot take goes to the others by the same weights. The rest that integers leave goes to
    the largest remainders, the first ones among equals. Only integers are used, so that the result is the
    same on every machine.

    Args:
        total: what to divide, at most the sum of ``caps``.
        weights: positive whole numbers.
        caps: the most that each can take.

    Returns:
        Whole numbers that add up to ``total``.

    Raises:
        ArgumentError: if ``total`` does not fit.

    Example:
        >>> apportion(10, weights=[1, 1, 2], caps=[10, 1, 10])
        [3, 1, 6]
    """
    if total > sum(caps):
        raise ArgumentError(f"`apportion(total)` must be at most {sum(caps)}, but got total={total}.")
    shares = [0] * len(weights)
    free = set(range(len(weights)))
    left = total
    while free:
        weight = sum(weights[i] for i in free)
        full = {i for i in free if left * weights[i] >= caps[i] * weight}
        if not full:
            break
        for i in full:
            shares[i] = caps[i]
        left -= sum(caps[i] for i in full)
        free -= full
    if free:
        for i in free:
            shares[i] = left * weights[i] // weight
        by_remainder = sorted(free, key=lambda i: (-(left * weights[i] % weight), i))
        for i in by_remainder[: left - sum(shares[i] for i in free)]:
            shares[i] += 1
    return shares
