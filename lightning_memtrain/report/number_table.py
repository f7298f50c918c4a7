"""Tables of numbers for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_memtrain.core import MIB

if TYPE_CHECKING:  # memtrain --help need not wait for it
    from rich.table import Table


def number_table(first: str, numbers: tuple[str, ...]) -> Table:
    """Begin a table with a column of names and columns of numbers.

    Args:
        first: heading of the names; only they give way on a narrow terminal.
        numbers: headings of the numbers.

    Returns:
        A table without rows.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def mebibytes(num_bytes: int) -> str:
    """Bytes as a number of MiB, without the unit.

    Args:
        num_bytes: any.

    Returns:
        The number, with two digits after the point.

    Example:
        >>> mebibytes(3 * 2**19)
        '1.50'
    """
    return f"{num_bytes / MIB:,.2f}"
