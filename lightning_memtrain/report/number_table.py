"""Tables of numbers for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_memtrain.core import MIB

if TYPE_CHECKING:  # memtrain --help need not wait for it
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

# What is left of a path, where there is little room, still tells modules apart.
_LEAST_WIDTH = 12


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


class OneLine:
    """A module's path with its class, in one line of the width that there is.

    The class goes first, then the beginning of the path: modules differ at its end.

    Args:
        path: of the module.
        type_name: its class.
    """

    def __init__(self, path: str, type_name: str) -> None:
        self._path, self._type_name = path, type_name

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """As wide as it is, and as narrow as need be."""
        from rich.measure import Measurement

        width = len(f"{self._path} {self._type_name}")
        return Measurement(min(_LEAST_WIDTH, width), width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Asked once the width is known."""
        from rich.text import Text

        width, path = options.max_width, self._path
        if len(path) > width:
            path = f"...{path[len(path) - width + 3 :]}"
        name = Text(path, no_wrap=True, overflow="crop")
        if len(path) + 1 + len(self._type_name) <= width:
            name.append(f" {self._type_name}", "dim")
        yield name


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
