"""Binary units. Every quantity in this library is in bytes unless its name ends in another unit."""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Integral

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")


def format_bytes(num_bytes: int | float) -> str:
    """Write a byte count in the largest binary unit that keeps it at least 1, with two decimals.

    Args:
        num_bytes: a count of bytes; may be negative (a difference).

    Returns:
        The count with its unit, e.g. ``"381.15 MiB"``; whole bytes below 1 KiB.

    Example:
        >>> format_bytes(399_660_000)
        '381.15 MiB'
        >>> format_bytes(-12)
        '-12 B'
    """
    size = abs(num_bytes)
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def parse_bytes(value: int | str, *, argument: str = "parse_bytes(value)") -> int:
    """Read a number of bytes that a person wrote.

    Args:
        value: bytes, at least 1; or a number with a unit: ``B``, ``kB``, ``MB``, ``GB``, ``TB`` (powers
            of 1000) and ``KiB``, ``MiB``, ``GiB``, ``TiB`` (powers of 1024), spelt exactly so.
        argument: what the caller's user has written, for the error, e.g. ``"plan(budget)"``.

    Returns:
        Whole bytes; a fraction of a byte is dropped.

    Raises:
        ValueError: if ``value`` is no such number, has no unit or an unknown one, or is less than a byte.

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
        raise ValueError(
            f"`{argument}` must be a number of bytes, at least 1, or a text such as '4GiB', '512 MiB' or "
            f"'800MB', but got {value!r}. The units are {', '.join(_FACTORS)}; capitals matter."
        )
    return num_bytes
