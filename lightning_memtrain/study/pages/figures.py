"""The figures of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lightning_memtrain.core import MIB, Category, format_bytes
from lightning_memtrain.core.units import format_seconds
from lightning_memtrain.study.grid import Score
from lightning_memtrain.study.pages.svg_chart import WIDTH, Line, Point, scatter, svg
from lightning_memtrain.study.printed_numbers import short_score, times
from lightning_memtrain.study.study_result import StudyResult, VariantResult

# From the bottom of the stack to its top, as in the page of a memory report.
STACK = (
    Category.PARAMETERS,
    Category.BUFFERS,
    Category.OPTIMIZER_STATE,
    Category.GRADIENTS,
    Category.BUCKETS,
    Category.INPUTS,
    Category.GATHERED_WEIGHTS,
    Category.UNSHARDED_GRADIENTS,
    Category.ACTIVATIONS,
    Category.TEMPORARY,
    Category.WORKSPACE,
)
_ROW, _BAR, _LEGEND_ROW = 34, 13, 18


def draw_figures(result: StudyResult) -> dict[str, tuple[str, str]]:
    """Draw what there are numbers for.

    Args:
        result: of a study.

    Returns:
        Title and ``svg`` element of each figure, by the name of its file.
    """
    figures: dict[str, tuple[str, str]] = {}
    measured = [row for row in result.variants if row.peak_bytes]
    if measured:
        figures["peaks"] = (
            "Peak by category",
            bars({row.name: row.at_peak for row in measured}, _less(measured)),
        )
    scored = [row for row in measured if row.score is not None]
    if result.score is not None and scored:
        figures["score"] = ("Score against memory", _score_against_memory(result, scored))
    timed = [row for row in measured if row.step_seconds]
    if timed:
        figures["time"] = ("Step time against memory", _time_against_memory(result, timed))
    usable, upright = (scored, True) if result.score is not None and scored else (timed, False)
    alone = [row for row in usable if row.technique]
    if alone:
        figures["techniques"] = ("Each technique alone", _alone(result, usable, upright))
    if any(row.members for row in usable):
        figures["combinations"] = ("Combinations", _combinations(result, usable, upright))
    return figures


def bars(peaks: Mapping[str, Mapping[str, int]], notes: Mapping[str, str] | None = None) -> str:
    """Draw a bar for each peak, stacked by category.

    Args:
        peaks: bytes by category, by name.
        notes: written behind the bytes.

    Returns:
        An ``svg`` element.
    """
    shown = [one for one in STACK if any(held.get(one.value, 0) > 0 for held in peaks.values())]
    parts, y = _category_legend(shown)
    # The workspace may be negative: an allocator that saw fewer bytes than the ledger.
    highest = max((sum(max(0, size) for size in held.values()) for held in peaks.values()), default=0) or 1
    for name, held in peaks.items():
        total = sum(held.values())
        note = (notes or {}).get(name, "")
        parts.append(f'<text class="strong" x="0" y="{y + 12}">{escape(_fitting(name, 44))}</text>')
        parts.append(
            f'<text x="{WIDTH}" y="{y + 12}" text-anchor="end">{escape(format_bytes(total) + note)}</text>'
        )
        x = 0.0
        for category in shown:
            size = held.get(category.value, 0)
            width = max(0.0, size) / highest * WIDTH
            if width:
                label = category.value.replace("_", " ")
                parts.append(
                    f'<rect class="c-{category.value}" x="{x:.2f}" y="{y + 17}" width="{width:.2f}" '
                    f'height="{_BAR}"><title>{escape(name)}: {label} {format_bytes(size)}</title></rect>'
                )
            x += width
        y += _ROW + 4
    return svg("Peak by category", y, parts)


def _category_legend(shown: Sequence[Category]) -> tuple[list[str], float]:
    parts: list[str] = []
    x, y = 0.0, 12.0
    for category in shown:
        label = category.value.replace("_", " ")
        width = 24 + 6.3 * len(label)
        if x + width > WIDTH:
            x, y = 0.0, y + _LEGEND_ROW
        parts.append(
            f'<rect class="c-{category.value}" x="{x:.1f}" y="{y - 9}" width="10" height="10" rx="3"/>'
        )
        parts.append(f'<text x="{x + 15:.1f}" y="{y}">{label}</text>')
        x += width
    return parts, y + 14


def _less(rows: Sequence[VariantResult]) -> dict[str, str]:
    return {row.name: f", {times(row.times_less)} less" for row in rows if (row.times_less or 1) > 1.005}


def _fitting(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _details(row: VariantResult, score: Score | None) -> str:
    parts = [format_bytes(row.peak_bytes or 0)]
    if row.score is not None and score is not None:
        parts.append(short_score(score, row.score, row.score_spread))
    if row.step_seconds is not None:
        parts.append(f"{format_seconds(row.step_seconds)} a step")
    return ", ".join(parts)


def _group(row: VariantResult, baseline: str) -> str:
    if row.name == baseline:
        return "baseline"
    return "combination" if row.members else row.technique or row.name


def _colours(result: StudyResult) -> list[str]:
    """Groups in one order for all figures: the baseline first, then combinations, then techniques."""
    found = [_group(row, result.baseline) for row in result.variants]
    return list(dict.fromkeys(["baseline", "combination", *found]))


def _point(row: VariantResult, result: StudyResult, y: float, spread: float = 0.0) -> Point:
    x = (row.peak_bytes or 0) / MIB
    return Point(row.name, x, y, _group(row, result.baseline), spread, _details(row, result.score))


def _score_point(row: VariantResult, result: StudyResult) -> Point:
    assert result.score is not None
    assert row.score is not None
    spread = result.score.shown(row.score_spread or 0.0)
    return _point(row, result, result.score.shown(row.score), spread)


def _score_against_memory(result: StudyResult, rows: Sequence[VariantResult]) -> str:
    assert result.score is not None
    points = [_score_point(row, result) for row in rows]
    on_front = {row.name for row in rows if row.on_front}
    front = sorted((point for point in points if point.name in on_front), key=lambda point: point.x)
    # Names of the front come first, since there may not be room for all.
    ordered = sorted(points, key=lambda point: point.name not in on_front)
    return scatter(
        "Score against memory",
        ordered,
        "peak (MiB)",
        result.score.label,
        lines=[Line(front)] if front else [],
        colours=_colours(result),
    )


def _time_against_memory(result: StudyResult, rows: Sequence[VariantResult]) -> str:
    points = [_point(row, result, 1000 * (row.step_seconds or 0)) for row in rows]
    colours = _colours(result)
    return scatter("Step time against memory", points, "peak (MiB)", "step (ms)", colours=colours)


def _usual(row: VariantResult, result: StudyResult, upright: bool) -> Point:
    return _score_point(row, result) if upright else _point(row, result, 1000 * (row.step_seconds or 0))


def _y_label(result: StudyResult, upright: bool) -> str:
    return result.score.label if upright and result.score is not None else "step (ms)"


def _alone(result: StudyResult, rows: Sequence[VariantResult], upright: bool) -> str:
    """A line for each technique through its strengths, which stand beside the points."""
    points, lines = [], []
    for row in rows:
        if row.name == result.baseline:
            points.append(_usual(row, result, upright))
    for technique in dict.fromkeys(row.technique for row in rows if row.technique):
        own = [row for row in rows if row.technique == technique]
        own.sort(key=lambda row: row.peak_bytes or 0)
        of_technique = []
        for row in own:
            point = _usual(row, result, upright)
            label = row.name if row.strength is None else str(row.strength)
            of_technique.append(Point(**{**vars(point), "group": technique, "label": label}))
        points += of_technique
        lines.append(Line(of_technique, technique))
    label, colours = _y_label(result, upright), _colours(result)
    return scatter("Each technique alone", points, "peak (MiB)", label, lines=lines, colours=colours)


def _combinations(result: StudyResult, rows: Sequence[VariantResult], upright: bool) -> str:
    """The combinations, over the single settings that they are made of."""
    members = {member for row in rows for member in row.members}
    points = []
    for row in rows:
        point = _usual(row, result, upright)
        if row.members or row.name == result.baseline:
            points.append(point)
        elif row.name in members:
            points.append(Point(**{**vars(point), "faint": True}))
    points.sort(key=lambda point: point.faint)
    label, colours = _y_label(result, upright), _colours(result)
    return scatter("Combinations", points, "peak (MiB)", label, colours=colours)
