"""The rows of a comparison, as text: the same for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_memtrain.core import Category, format_bytes
from lightning_memtrain.core.units import format_seconds
from lightning_memtrain.study.comparison import Comparison
from lightning_memtrain.study.printed_numbers import times

MISSING = "-"


def headings(comparison: Comparison, first: str) -> list[str]:
    """Names of the columns: the runs, and of two runs the change."""
    names = [run.name for run in comparison.runs]
    return [first, *names, *(["change"] if len(names) == 2 else [])]


def memory_rows(comparison: Comparison) -> list[list[str]]:
    """The peaks, and below what they are made of."""
    runs = comparison.runs
    rows = [_byte_row("peak", [run.peak_bytes for run in runs], comparison)]
    factors = [times(runs[0].peak_bytes / run.peak_bytes) if run.peak_bytes else MISSING for run in runs]
    rows.append(["times less", MISSING, *factors[1:], *([""] if len(runs) == 2 else [])])
    for category in Category:
        sizes = [run.at_peak.get(category.value, 0) for run in runs]
        if any(sizes):
            rows.append(_byte_row(category.value.replace("_", " "), sizes, comparison))
    return rows


def other_rows(comparison: Comparison) -> list[list[str]]:
    """Step time, and what validation and test have logged."""
    runs = comparison.runs
    seconds = [run.step_seconds for run in runs]
    row = ["median step", *(MISSING if one is None else format_seconds(one) for one in seconds)]
    if len(runs) == 2:
        row.append(times(seconds[1] / seconds[0]) if seconds[0] and seconds[1] else "")
    rows = [row]
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        values = [run.metrics.get(name) for run in runs]
        row = [name, *(MISSING if value is None else f"{value:.4g}" for value in values)]
        if len(runs) == 2:
            first, second = values
            row.append("" if first is None or second is None else f"{second - first:+.4g}")
        rows.append(row)
    return rows


def module_rows(comparison: Comparison, *, types: bool) -> list[list[str]]:
    """The modules that differ most, with their classes if that is asked for."""
    rows = []
    for module in comparison.modules:
        name = module.name or "(model)"
        rows.append(
            _byte_row(f"{name} {module.type_name}" if types else name, module.total_bytes, comparison)
        )
    return rows


def technique_rows(comparison: Comparison) -> list[list[str]]:
    """Each run with its techniques."""
    return [[run.name, "; ".join(run.techniques) or "none"] for run in comparison.runs]


def _byte_row(name: str, sizes: Sequence[int | None], comparison: Comparison) -> list[str]:
    row = [name, *(MISSING if size is None else format_bytes(size) for size in sizes)]
    if len(comparison.runs) == 2:
        change = (sizes[1] or 0) - (sizes[0] or 0)
        row.append(f"+{format_bytes(change)}" if change > 0 else format_bytes(change))
    return row
