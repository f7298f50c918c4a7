"""The page of a study, and its figures as files."""

from __future__ import annotations

import json
from html import escape

from lightning_memtrain.core import format_bytes
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.core.units import format_seconds
from lightning_memtrain.study.pages.figures import draw_figures
from lightning_memtrain.study.pages.page_parts import card, page, standalone, table
from lightning_memtrain.study.printed_numbers import short_score, times
from lightning_memtrain.study.study_folder import StudyFolder
from lightning_memtrain.study.study_result import StudyResult, StudyRun, VariantResult

_NOTES = {
    "peaks": "Of the run with the highest peak of each variant; by the device's allocator where it is known.",
    "score": "Mean of the seeds, with their standard deviation. The dashed line joins what no other variant "
    "beats in both; the axis of memory is logarithmic where sizes differ much.",
    "time": "Median step, of steps that nobody measured the memory of.",
    "techniques": "One line for each technique, through its strengths.",
    "combinations": "Grey: the single settings that they are made of.",
}


def save_study(result: StudyResult, folder: StudyFolder) -> None:
    """Write ``study.json``, the page and the figures; each is there as a whole or as it was.

    Args:
        result: what came of it so far.
        folder: where they go.
    """
    write_atomically(folder.results, result.to_json())
    figures = draw_figures(result)
    write_atomically(folder.page, render_study(result, figures))
    for name, (_, figure) in figures.items():
        write_atomically(folder.figures / f"{name}.svg", standalone(figure))


def render_study(result: StudyResult, figures: dict[str, tuple[str, str]] | None = None) -> str:
    """Write the page of a study.

    Args:
        result: what came of it so far.
        figures: as :func:`draw_figures` makes them; ``None`` to make them here.

    Returns:
        The whole page, which needs no network and no script.
    """
    drawn = draw_figures(result) if figures is None else figures
    cards = {name: card(title, _NOTES[name], figure, name) for name, (title, figure) in drawn.items()}
    left = [cards[name] for name in ("peaks",) if name in cards]
    right = [cards[name] for name in ("score", "time", "techniques", "combinations") if name in cards]
    if left and right and len(result.variants) < 12:  # few bars are as high as one figure
        left.append(right.pop())
    columns = f'<div class="two"><div>{"".join(left)}</div><div>{"".join(right)}</div></div>' if cards else ""
    return page(
        "Study",
        result.recipe,
        _summary(result),
        [_variants(result), columns, _runs(result), _environment(result)],
    )


def _summary(result: StudyResult) -> str:
    finished = sum(run.state == "finished" for run in result.runs)
    failed = sum(run.state == "failed" for run in result.runs)
    seconds = sum(run.record.seconds for run in result.runs if run.record is not None)
    parts = [f"{finished} of {len(result.runs)} runs finished"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{format_seconds(seconds)} of training", result.created[:16].replace("T", " ") + " UTC"]
    return ", ".join(parts)


def _variants(result: StudyResult) -> str:
    headings = ["Variant", "Runs", "Peak", "Ledger", "Times less", "Step", "Times slower"]
    headings += [] if result.score is None else [result.score.metric, "Change"]
    rows = [_variant_row(row, result) for row in result.variants]
    stars = ["front" if row.on_front else "" for row in result.variants]
    note = f"Compared with {result.baseline}."
    if result.score is not None:
        note += " A score is the mean of the seeds and their standard deviation."
    if any(stars):
        note += " A star: no other variant is at least as good in score and memory and better in one."
    return card("Variants", note, table(headings, rows, styles=stars), "variants")


def _variant_row(row: VariantResult, result: StudyResult) -> list[str]:
    cells = [
        row.name,
        f"{row.num_finished}/{row.num_runs}",
        "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
        "" if row.ledger_peak_bytes is None else format_bytes(row.ledger_peak_bytes),
        times(row.times_less),
        "" if row.step_seconds is None else format_seconds(row.step_seconds),
        times(row.times_slower),
    ]
    score = result.score
    if score is None:
        return cells
    if row.score is None:
        return [*cells, "", ""]
    change = "" if row.name == result.baseline or row.score_change is None else score.shown(row.score_change)
    return [
        *cells,
        short_score(score, row.score, row.score_spread),
        change if isinstance(change, str) else format(change, "+.2f" if score.percent else "+.3g"),
    ]


def _runs(result: StudyResult) -> str:
    headings = ["Run", "State", "Time", "Parts"] + ([] if result.score is None else [result.score.metric])
    headings.append("Remark")
    rows = [_run_row(run, result) for run in result.runs]
    failed = ["failed" if run.state == "failed" else "" for run in result.runs]
    content = table(headings, rows, left=[1, len(headings) - 1], styles=failed)
    settings = "".join(
        f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.command)}\n\n"
        f"{escape(json.dumps(run.settings, indent=1))}</pre></details>"
        for run in result.runs
    )
    note = "Parts: how often it was begun or resumed. Every run's folder is in runs/, its output in logs/."
    return card("Runs", note, content + f"<h3>Commands and settings</h3>{settings}", "runs")


def _run_row(run: StudyRun, result: StudyResult) -> list[str]:
    record = run.record
    row = [
        run.name,
        run.state,
        "" if record is None else format_seconds(record.seconds),
        "" if record is None else str(record.num_parts),
    ]
    if result.score is not None:
        row.append("" if run.score is None else short_score(result.score, run.score))
    return [*row, run.reason]


def _environment(result: StudyResult) -> str:
    """Where it ran; of several machines, all."""
    found: dict[str, list[str]] = {"runs at a time": [str(result.num_jobs)]}
    if result.commit is not None:
        found["commit"] = [result.commit]
    for run in result.runs:
        for name, value in (run.record.environment if run.record is not None else {}).items():
            values = found.setdefault(name.replace("_", " "), [])
            if value not in values:
                values.append(value)
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(', '.join(values))}</dd>" for name, values in found.items()
    )
    return card("Environment", "", f'<dl class="words">{rows}</dl>', "environment")
