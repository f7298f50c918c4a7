"""Binary units. Every quantity in this library is in bytes unless its name ends in another unit."""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30


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
