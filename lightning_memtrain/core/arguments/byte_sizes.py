"""Sizes in bytes, as users write them."""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Integral

from lightning_memtrain.core.arguments.argument_error import ArgumentError

_FACTORS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")


def parse_bytes(value: int | str, *, argument: str = "parse_bytes(value)") -> int:
    """Read a number of bytes that a person wrote.

    Args:
        value: bytes, at least 1; or a number with a unit: ``B``, ``kB``, ``MB``, ``GB``, ``TB`` (powers
            of 1000) and ``KiB``, ``MiB``, ``GiB``, ``TiB`` (powers of 1024), spelt exactly so.
        argument: what the caller's user has written, for the error, e.g. ``"plan(budget)"``.

    Returns:
        Whole bytes; a fraction of a byte is dropped.

    Raises:
        ArgumentError: if ``value`` is no such number, has no unit or an unknown one, or is less than a byte.

    Example:
        >>> parse_bytes("1.5 GiB"), parse_bytes("800MB"), parse_bytes(4096)
        (1610612736, 800000000, 4096)
    """
    num_bytes = 0
    if isinstance(value, Integral) and not isinstance(value, bool):
        num_bytes = int(value)
    elif isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())) and found[2] in _FACTORS:
        num_bytes = int(Fraction(found[1]) * _FACTORS[found[2]])
    if num_bytes < 1:
        raise ArgumentError(
            f"`{argument}` must be a number of bytes, at least 1, or a text such as '4GiB', '512 MiB' or "
            f"'800MB', but got {value!r}. The units are {', '.join(_FACTORS)}; capitals matter."
        )
    return num_bytes
