"""The largest of many numbers in linear time: digits are counted, nothing is sorted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_DIGIT_BITS = 11
_NUM_DIGITS = 1 << _DIGIT_BITS
_NO_KEYS = torch.empty(0, dtype=torch.int32)
_KEY_DTYPES = {torch.float32: torch.int32, torch.float64: torch.int64}


class Level(NamedTuple):
    """Where the largest numbers begin.

    Args:
        key: of the smallest of them; or the least of a range of keys that the smallest is in.
        num_equal: how many of those with this key, or in this range, are among them.
        num_tied: how many have this key, or are in this range.
    """

    key: int
    num_equal: int
    num_tied: int


def keys_of(numbers: Tensor) -> Tensor:
    """Integers, not negative, in the order of magnitudes; what is not a number comes behind infinity.

    Args:
        numbers: floating point, of any shape.

    Returns:
        A new tensor of the same shape, int64 for float64 and int32 for all others.

    Example:
        >>> keys_of(torch.tensor([-2.0, 0.0, 1.5])).argsort().tolist()
        [1, 2, 0]
    """
    exact = numbers.dtype if numbers.dtype in _KEY_DTYPES else torch.float32
    # The bits of a number that is not negative are in the order of these numbers.
    return numbers.abs().to(exact).view(_KEY_DTYPES[exact])


def level_of_largest(
    pieces: Callable[[], Iterable[Tensor]],
    count: int,
    *,
    bits: int = 32,
    num_void: int = 0,
    most_tied: int = 0,
) -> Level:
    """Find from which key on numbers are among the largest.

    Args:
        pieces: makes all keys anew at each call, in int32 or int64 pieces of one axis that are overwritten;
            they may share memory.
        count: how many are the largest, from 1 to the number of keys.
        bits: of a key.
        num_void: of the keys that are 0, how many stand for nothing.
        most_tied: a range of keys will do that no more are in.

    Returns:
        The level.

    Example:
        >>> keys = torch.tensor([7, 1, 7, 3, 7], dtype=torch.int32)
        >>> level_of_largest(lambda: [keys.clone()], count=2)
        Level(key=7, num_equal=2, num_tied=3)
    """
    prefix, shift, is_first = 0, bits, True
    while shift:
        before, shift = shift, max(0, shift - _DIGIT_BITS)
        counts: Tensor | None = None
        waiting: list[Tensor] = []
        num_zero = -num_void
        for keys in pieces():
            if not is_first:
                if not prefix and not keys.any():  # where there is no gradient, say
                    num_zero += len(keys)
                    continue
                # What begins as the level does has none of these digits left.
                keys.bitwise_xor_(prefix << before)
                keys = keys[keys < 1 << before]
            waiting.append(keys.bitwise_right_shift_(shift))
            # A few take less time than their table; but those of the first digit may be in memory that the
            # next piece uses again.
            if is_first or sum(map(len, waiting)) > _NUM_DIGITS:
                counts, waiting = _counted(waiting, counts), []
        if waiting or counts is None:
            counts = _counted(waiting or [_NO_KEYS], counts)
        if not prefix:
            counts[0] += num_zero
        from_top = counts.flip(0).cumsum_(0)
        place = int(torch.searchsorted(from_top, count))
        num_larger = int(from_top[place - 1]) if place else 0
        num_tied = int(from_top[place]) - num_larger
        count -= num_larger
        prefix = prefix << (before - shift) | (_NUM_DIGITS - 1 - place)
        if num_tied <= most_tied:
            break
        is_first = False
    return Level(prefix << shift, count, num_tied)


def _counted(parts: list[Tensor], so_far: Tensor | None) -> Tensor:
    digits = parts[0] if len(parts) == 1 else torch.cat(parts)
    counts = torch.bincount(digits, minlength=_NUM_DIGITS)
    return counts if so_far is None else counts.add_(so_far)


def are_largest(keys: Tensor, count: int, *, first: bool = False) -> Tensor:
    """Mark the largest of some keys.

    Args:
        keys: int32 or int64 of one axis, not negative.
        count: how many, at most all.
        first: whether of equal ones the first are, and not the last.

    Returns:
        Bool of one axis, ``True`` for as many.

    Example:
        >>> are_largest(torch.tensor([3, 9, 3], dtype=torch.int32), count=2)
        tensor([False,  True,  True])
        >>> are_largest(torch.tensor([3, 9, 3], dtype=torch.int32), count=2, first=True)
        tensor([ True,  True, False])
    """
    if not count:
        return torch.zeros_like(keys, dtype=torch.bool)
    level = level_of_largest(lambda: [keys.clone()], count, bits=8 * keys.itemsize)
    if level.num_equal == level.num_tied:
        return keys >= level.key
    chosen = keys > level.key
    tied = (keys == level.key).nonzero().view(-1)
    chosen[tied[: level.num_equal] if first else tied[-level.num_equal :]] = True
    return chosen
