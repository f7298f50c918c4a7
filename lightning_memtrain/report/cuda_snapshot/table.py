"""A snapshot as text for the terminal."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from lightning_memtrain.core import format_bytes
from lightning_memtrain.report.cuda_snapshot import words
from lightning_memtrain.report.cuda_snapshot.document import CudaSnapshot
from lightning_memtrain.report.cuda_snapshot.summary import SnapshotSummary, summarize
from lightning_memtrain.report.number_table import mebibytes, number_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_NUM_ROWS = 8


def render_snapshot_table(snapshot: CudaSnapshot) -> RenderableType:
    """Lay a snapshot out for the terminal.

    Args:
        snapshot: what was read.

    Returns:
        A rich renderable.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text.assemble(("CUDA memory snapshot", "bold"), f"  {snapshot.name}")]
    if not snapshot.devices:
        parts.append(Text("It holds no memory of any device."))
    for device in snapshot.devices:
        parts += _device(summarize(device, snapshot.allocator_settings, max_rows=_NUM_ROWS))
    return Group(*parts)


def print_snapshot_table(snapshot: CudaSnapshot, file: IO[str] | None = None) -> None:
    """Print a snapshot, without colours where ``file`` is no terminal.

    Args:
        snapshot: what was read.
        file: where to print; ``None`` is standard output.
    """
    from rich.console import Console

    Console(file=file, highlight=False).print(render_snapshot_table(snapshot))


def _device(summary: SnapshotSummary) -> list[RenderableType]:
    from rich.text import Text

    peak = format_bytes(summary.peak_allocated_bytes)
    title = Text.assemble(
        "\n",
        (f"cuda:{summary.index}", "bold cyan"),
        ": peak ",
        (peak, "bold"),
        f" allocated, {format_bytes(summary.peak_reserved_bytes)} reserved; "
        f"{summary.comparison.num_events:,} events were recorded",
    )
    parts: list[RenderableType] = [title]
    for failure in summary.shortages:
        parts.append(Text(f"Out of memory, event {failure.event:,}", style="bold red"))
        parts.append(Text(f"  {words.shortage(failure)}"))
        parts.append(Text(f"  {words.where(failure.frames)}"))
    parts += [_moments(summary), Text(words.free_at_end(summary)), Text(words.certainty(summary))]
    if summary.live:
        parts += ["", _call_sites(summary), _blocks(summary)]
    return parts


def _moments(summary: SnapshotSummary) -> Table:
    table = number_table("MiB", ("Allocated", "Reserved", "Not allocated"))
    for name, moment in (("at the peak", summary.peak_event), ("at the end", -1)):
        allocated, reserved = summary.allocated_bytes[moment], summary.reserved_bytes[moment]
        table.add_row(name, mebibytes(allocated), mebibytes(reserved), mebibytes(reserved - allocated))
    return table


def _call_sites(summary: SnapshotSummary) -> Table:
    from rich.text import Text  # a plain string would be read as markup

    table = number_table(f"Allocated {words.focus(summary)}, by call stack", ("MiB", "Share", "Blocks"))
    for site in summary.call_sites:
        share = words.share(site.num_bytes, summary)
        table.add_row(
            Text(words.where(site.frames)), mebibytes(site.num_bytes), share, f"{site.num_blocks:,}"
        )
    return table


def _blocks(summary: SnapshotSummary) -> Table:
    from rich.text import Text

    table = number_table(f"Largest blocks {words.focus(summary)}", ("MiB", "Made by event"))
    for block in summary.live:
        made = "before" if block.event is None else f"{block.event:,}"
        table.add_row(Text(words.where(block.frames)), mebibytes(block.num_bytes), made)
    return table
