"""The memory report as text for the terminal."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lightning_memtrain.core import (
    Category,
    Growth,
    MemoryBreakdown,
    ModuleMemory,
    TechniqueRecord,
    format_bytes,
)
from lightning_memtrain.report.memory_report import MemoryReport, OutOfMemory
from lightning_memtrain.report.number_table import OneLine, mebibytes, number_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_NUM_MODULES = 10
_NUM_GROWTH_ROWS = 5
_NUM_EVENTS = 5
_BAR_WIDTH = 16
# A share of next to nothing says nothing.
_MOST_OFF = 10


def render_table(report: MemoryReport) -> RenderableType:
    """Lay the report out for the terminal.

    Args:
        report: what the profiler learned.

    Returns:
        A rich renderable: print it with a :class:`rich.console.Console`, or with :func:`print_table`.
    """
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble(
        ("Memory report", "bold"), f"  {report.model}, {report.num_parameters:,} parameters, {report.created}"
    )
    parts: list[RenderableType] = [title]
    if report.out_of_memory is not None:
        parts.append(_out_of_memory(report.out_of_memory))
    parts += [_technique(record) for record in report.techniques]
    if not report.stages:
        parts.append(Text("No step was profiled."))
    for stage, breakdown in sorted(report.stages.items(), key=lambda one: one[0] != "fit"):
        parts += ["", _headline(report, stage, breakdown), *_times(report, stage)]
        if stage != "fit" and "fit" in report.stages:  # beside training it is only said what matters
            parts.append(_held(breakdown))
        else:
            parts += [_categories(breakdown), _groups(breakdown)]
        parts += _allocator(breakdown)
        if breakdown.modules and (stage == "fit" or "fit" not in report.stages):
            parts.append(_modules(breakdown))
        if breakdown.sites:
            parts.append(_sites(breakdown))
        parts += _growth(report.growth.get(stage, ()))
    parts += _predicted(report)
    if report.ranks is not None:
        smallest, largest = (format_bytes(report.ranks[f"{end}_peak_bytes"]) for end in ("min", "max"))
        parts.append(Text(f"Peak over {report.ranks['world_size']} ranks: from {smallest} to {largest}."))
    if report.suggestions:
        parts += ["", Text("Less memory, for `callbacks`:", style="bold")]
        parts += [Text(f"  {line}", overflow="fold") for line in report.suggestions]
    return Group(*parts)


def print_table(report: MemoryReport, file: IO[str] | None = None) -> None:
    """Print the report, without colours where ``file`` is no terminal.

    Args:
        report: what the profiler learned.
        file: where to print; ``None`` is standard output.
    """
    from rich.console import Console

    Console(file=file, highlight=False).print(render_table(report))


def table_text(report: MemoryReport, width: int = 100) -> str:
    """The report as plain text.

    Args:
        report: what the profiler learned.
        width: columns that there are.

    Returns:
        The text, without colours.
    """
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(render_table(report))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _headline(report: MemoryReport, stage: str, breakdown: MemoryBreakdown) -> RenderableType:
    from rich.text import Text

    peaks = [step.peak_bytes for step in report.steps if step.stage == stage]
    source = "ledger" if breakdown.allocator_peak_bytes is None else "allocator"
    line = Text.assemble(
        (stage, "bold cyan"),
        ": peak ",
        (format_bytes(breakdown.peak_bytes), "bold"),
        f" ({source}) on {breakdown.device}",
    )
    if breakdown.peak_event:
        line.append(f", after {breakdown.peak_event!r}")
    if peaks:
        line.append(f"; {len(peaks):,} {'step' if len(peaks) == 1 else 'steps'}")
    if breakdown.aside_peak_bytes:
        line.append(f"; probes, which are left out, held {format_bytes(breakdown.aside_peak_bytes)}")
    return line


def _times(report: MemoryReport, stage: str) -> list[RenderableType]:
    from rich.text import Text

    times = report.step_times.get(stage)
    return [] if times is None else [Text(f"Time: {times}")]


def _held(breakdown: MemoryBreakdown) -> RenderableType:
    """What holds most at the peak, in a line."""
    from rich.text import Text

    largest = sorted(breakdown.at_peak.items(), key=lambda one: -one[1])
    held = [
        f"{category.value.replace('_', ' ')} {format_bytes(size)}" for category, size in largest if size > 0
    ]
    return Text(f"Held: {', '.join(held) or 'nothing'}")


def _categories(breakdown: MemoryBreakdown) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    table = number_table("Category", ("At peak MiB", "Share", "", "Max MiB"))
    peak_bytes = breakdown.peak_bytes
    for category in breakdown.shown:
        num_bytes = breakdown.at_peak[category]
        if category is Category.WORKSPACE and breakdown.allocator_peak_bytes is None:
            continue
        maximum = "" if category is Category.WORKSPACE else mebibytes(breakdown.maxima[category])
        bar = ProgressBar(total=max(peak_bytes, 1), completed=max(num_bytes, 0), width=_BAR_WIDTH)
        label = category.value.replace("_", " ")
        table.add_row(label, mebibytes(num_bytes), _share(num_bytes, peak_bytes), bar, maximum)
        if category is Category.ACTIVATIONS and breakdown.recomputed_max_bytes:
            recomputed = breakdown.recomputed_at_peak_bytes
            cells = ("  of which recomputed", mebibytes(recomputed), _share(recomputed, peak_bytes))
            table.add_row(*cells, "", mebibytes(breakdown.recomputed_max_bytes), style="dim")
    table.add_section()
    total = "total (ledger)" if breakdown.allocator_peak_bytes is None else "total (allocator)"
    table.add_row(Text(total), mebibytes(peak_bytes), _share(peak_bytes, peak_bytes), "", "", style="bold")
    return table


def _groups(breakdown: MemoryBreakdown) -> RenderableType:
    from rich.text import Text

    held = breakdown.at_peak
    groups = (
        ("model", held.model_bytes),
        ("optimizer", held.optimizer_bytes),
        ("activations", held.activation_bytes),
    )
    rows = (f"{name} {format_bytes(size)} ({_share(size, held.total_bytes)})" for name, size in groups)
    return Text("By group: " + ", ".join(rows))


def _allocator(breakdown: MemoryBreakdown) -> list[RenderableType]:
    from rich.text import Text

    if breakdown.reserved_bytes is None:
        return []
    line = f"Reserved by the allocator: {format_bytes(breakdown.reserved_bytes)}"
    retries = breakdown.num_alloc_retries or 0
    if not retries:
        return [Text(line)]
    # Blocks of other sizes stood in the way, and each retry waits for the device.
    times = f"{retries:,} {'time' if retries == 1 else 'times'}"
    return [Text(f"{line}; it gave its free blocks back {times} to go on", style="yellow")]


def _modules(breakdown: MemoryBreakdown) -> Table:
    largest = sorted(breakdown.modules, key=lambda row: -row.total_bytes)[:_NUM_MODULES]
    names = ("Total", "Produced", "Saved", "Model", "Grads", "Optim")
    # Columns without a number leave their room to the names.
    shown = [
        index for index in range(len(names)) if not index or any(_module_bytes(row)[index] for row in largest)
    ]
    table = number_table("Module, MiB at peak", tuple(names[index] for index in shown))
    for row in largest:
        sizes = _module_bytes(row)
        name = OneLine(row.name or "(model)", row.type_name)
        table.add_row(name, *(mebibytes(sizes[index]) for index in shown))
    rest = len(breakdown.modules) - len(largest)
    if rest:
        table.caption = f"{rest:,} more {'module' if rest == 1 else 'modules'} in the HTML report"
        table.caption_justify = "left"
    return table


def _sites(breakdown: MemoryBreakdown) -> Table:
    """Lines of code with what they have made; what was there before the step by what it is."""
    sums: dict[tuple[str, str], list[int]] = {}
    for site in breakdown.sites:
        known = site.function if site.file else site.category.replace("_", " ")
        row = sums.setdefault((_from_here(str(site), site.file), known), [0, 0])
        row[0] += site.num_bytes
        row[1] += site.num_storages
    largest = sorted(sums.items(), key=lambda one: -one[1][0])
    table = number_table("Your code, MiB at peak", ("Made", "Storages"))
    for (place, function), (num_bytes, count) in largest[:_NUM_MODULES]:
        table.add_row(OneLine(place, function), mebibytes(num_bytes), f"{count:,}")
    if len(largest) > _NUM_MODULES:
        rest = len(largest) - _NUM_MODULES
        table.caption = f"{rest:,} more {'line' if rest == 1 else 'lines'} in the HTML report"
        table.caption_justify = "left"
    return table


def _from_here(text: str, file: str) -> str:
    """A file below the present folder without the way to there."""
    here = f"{Path.cwd()}{os.sep}"
    return text.replace(file, file.removeprefix(here), 1) if file.startswith(here) else text


def _module_bytes(row: ModuleMemory) -> tuple[int, ...]:
    return (
        row.total_bytes,
        row.produced_bytes,
        row.saved_bytes,
        row.parameters_bytes + row.buffers_bytes,
        row.gradients_bytes,
        row.optimizer_state_bytes,
    )


def _growth(rows: tuple[Growth, ...]) -> list[RenderableType]:
    from rich.text import Text

    if not rows:
        return []
    total = format_bytes(sum(row.num_bytes for row in rows))
    lines: list[RenderableType] = [Text(f"Growth: {total} outlived the step that made it", style="yellow")]
    for row in rows[:_NUM_GROWTH_ROWS]:
        name = row.module or "(outside of any submodule)"
        storages = f"{row.num_storages:,} {'storage' if row.num_storages == 1 else 'storages'}"
        lines.append(Text(f"  {name}: {format_bytes(row.num_bytes)} in {storages}"))
    if len(rows) > _NUM_GROWTH_ROWS:
        lines.append(Text(f"  and {len(rows) - _NUM_GROWTH_ROWS:,} more in the HTML report"))
    return lines


def _predicted(report: MemoryReport) -> list[RenderableType]:
    from rich.text import Text

    predicted = report.predicted
    if predicted is None:
        return []
    if predicted.failure:
        return [Text(f"Not predicted: {predicted.failure}", style="yellow")]
    table = number_table(f"{predicted.device}, MiB", ("Predicted", "Counted", "Off by"))
    for row in report.compared:
        off = "" if row.off is None or abs(row.off) >= _MOST_OFF else f"{row.off:+.2%}"
        table.add_row(
            row.name.replace("_", " "), mebibytes(row.predicted_bytes), mebibytes(row.counted_bytes), off
        )
    return [table, *(Text(f"Nobody knew beforehand: {one}", style="yellow") for one in predicted.unknown)]


def _technique(record: TechniqueRecord) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    name, settings = record.name, str(record).removeprefix(record.name)
    lines = [*record.events[:_NUM_EVENTS]]
    if len(record.events) > _NUM_EVENTS:
        lines.append(f"and {len(record.events) - _NUM_EVENTS:,} more in the HTML report")
    title = Text.assemble("Technique: ", (name, "bold"), settings)
    return Group(title, *(Padding(Text(line), (0, 0, 0, 2), expand=False) for line in lines))


def _out_of_memory(failure: OutOfMemory) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    held = format_bytes(failure.held_bytes)
    title = f"Out of memory in {failure.stage}, step {failure.step}, with {held} held"
    # A grid, so that long advice is indented where it wraps.
    grid = Table.grid(padding=(0, 1, 0, 0))
    for rank, holder in enumerate(failure.holders, start=1):
        size = format_bytes(holder.num_bytes)
        grid.add_row(f"  {rank}.", Text.assemble((holder.name, "bold"), f", {size}: {holder.advice}"))
    return Group(Text(title, style="bold red"), Text(f"  {failure.message}"), grid)


def _share(num_bytes: int, total_bytes: int) -> str:
    return f"{num_bytes / total_bytes:.1%}" if total_bytes else "-"
