"""A report of a model of very many modules in a file that is not as large as a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from numbers import Integral

from lightning_memtrain.core import ArgumentError, CodeSite, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.report.memory_report import MemoryReport


def limit_rows(report: MemoryReport, max_rows: int) -> MemoryReport:
    """Leave out what is least, and sum it up: every stage has at most so many rows of a kind.

    Of the modules, the half that is largest stays as it is. The others are summed by the module around them,
    or by the one around that if these are still too many; such a row is named ``"encoder.*"``, and its type
    tells how many modules it stands for. So the sum of all rows stays what it was. Of the moments, the higher
    of any two neighbours stays, as often as it takes; the peak is among them.

    Args:
        report: of a run.
        max_rows: rows of modules, and rows of moments, of a stage.

    Returns:
        Another report; the same one if nothing has to go.
    """
    stages = {name: _condensed(stage, max_rows) for name, stage in report.stages.items()}
    if all(stages[name] is stage for name, stage in report.stages.items()):
        return report
    return replace(report, stages=stages)


def validate_max_rows(max_rows: int | None) -> int | None:
    """Refuse what is no number of rows.

    Args:
        max_rows: as a user has given it.

    Returns:
        The same.

    Raises:
        ArgumentError: if it is neither ``None`` nor a whole number from 2 on.
    """
    refusal = (
        "`MemoryProfiler(max_rows)` must be an integer of at least 2, or None for all rows, "
        f"but got max_rows={max_rows!r}. Leave it out for a file of less than a megabyte."
    )
    if max_rows is None:
        return None
    if isinstance(max_rows, bool) or not isinstance(max_rows, Integral) or max_rows < 2:
        raise ArgumentError(refusal)
    return int(max_rows)


def _condensed(stage: MemoryBreakdown, max_rows: int) -> MemoryBreakdown:
    if max(len(stage.modules), len(stage.timeline), len(stage.sites)) <= max_rows:
        return stage
    return replace(
        stage,
        sites=_fewer_sites(stage.sites, max_rows),
        modules=_fewer_modules(stage.modules, max_rows),
        timeline=_fewer_moments(stage.timeline, max_rows),
    )


def _fewer_modules(rows: Sequence[ModuleMemory], max_rows: int) -> tuple[ModuleMemory, ...]:
    if len(rows) <= max_rows:
        return tuple(rows)
    by_size = sorted(range(len(rows)), key=lambda place: -rows[place].total_bytes)
    whole = {*by_size[: max_rows // 2]}
    small = [place for place in range(len(rows)) if place not in whole]
    parents = {place: rows[place].name for place in small}
    while True:
        parents = {place: name.rpartition(".")[0] for place, name in parents.items()}
        if len({*parents.values()}) <= max_rows - len(whole):
            break
    groups: dict[str, list[ModuleMemory]] = {}
    first: dict[str, int] = {}
    for place in small:
        groups.setdefault(parents[place], []).append(rows[place])
        first.setdefault(parents[place], place)
    kept = [(place, rows[place]) for place in whole]
    kept += [(first[parent], _sum(parent, group)) for parent, group in groups.items()]
    return tuple(row for _, row in sorted(kept, key=lambda one: one[0]))


def _sum(parent: str, rows: list[ModuleMemory]) -> ModuleMemory:
    if len(rows) == 1:
        return rows[0]
    names = [field.name for field in fields(ModuleMemory) if field.name.endswith("_bytes")]
    sums = {name: sum(getattr(row, name) for row in rows) for name in names}
    return ModuleMemory(f"{parent}.*" if parent else "*", f"{len(rows):,} modules", **sums)


def _fewer_sites(rows: Sequence[CodeSite], max_rows: int) -> tuple[CodeSite, ...]:
    if len(rows) <= max_rows:
        return tuple(rows)
    rest = rows[max_rows - 1 :]  # the largest come first
    num_bytes, num_storages = sum(row.num_bytes for row in rest), sum(row.num_storages for row in rest)
    others = CodeSite("", 0, f"{len(rest):,} other lines", "", num_bytes, num_storages)
    return (*rows[: max_rows - 1], others)


def _fewer_moments(rows: Sequence[TimelineEvent], max_rows: int) -> tuple[TimelineEvent, ...]:
    while len(rows) > max_rows:
        pairs = [rows[start : start + 2] for start in range(0, len(rows), 2)]
        rows = [max(pair, key=lambda event: event.held.total_bytes) for pair in pairs]
    return tuple(rows)
