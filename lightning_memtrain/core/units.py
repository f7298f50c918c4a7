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


def format_seconds(seconds: float) -> str:
    """Write a time with as many digits as matter.

    Args:
        seconds: at least 0.

    Returns:
        The time with its unit.

    Example:
        >>> [format_seconds(seconds) for seconds in (0.0124, 0.5, 12.34, 75, 5025)]
        ['12.4 ms', '500 ms', '12.3 s', '1 min 15 s', '1 h 23 min']
    """
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
