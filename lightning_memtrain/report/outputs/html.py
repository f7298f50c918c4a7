"""The memory report as one self-contained web page: no network, no other file."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_memtrain.core import MemoryBreakdown, format_bytes
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.report.memory_report import MemoryReport, StepPeak

# A page is looked at, not computed with: more points per stage than any screen has columns are of no use.
# The JSON report keeps every step.
_MAX_STEP_POINTS = 2000


def render_html(report: MemoryReport) -> str:
    """Write the report as a page that works from disk and inside an ``iframe``.

    Args:
        report: what the profiler learned.

    Returns:
        The whole page. It forbids itself any request by its content security policy.
    """
    peaks = [f"{stage}: peak {format_bytes(b.peak_bytes)}" for stage, b in report.stages.items()]
    parts = {
        "title": html.escape(f"Memory report: {report.model}"),
        "summary": html.escape("; ".join(peaks) or "No step was profiled."),
        "style": _asset("report.css"),
        "script": _asset("report.js"),
        "data": _script_safe_json(_page_data(report)),
    }
    page = []
    # One pass over the template, so that a name in the report can never be taken for a placeholder.
    for number, piece in enumerate(_asset("report.html").split("%%")):
        page.append(parts[piece] if number % 2 else piece)
    return "".join(page)


def save_html(report: MemoryReport, path: Path) -> None:
    """Write :func:`render_html`'s page to ``path``, replacing an older one in one move.

    Args:
        report: what the profiler learned.
        path: the file to write; its folder is made if need be.
    """
    write_atomically(path, render_html(report))


def _page_data(report: MemoryReport) -> dict[str, Any]:
    data = report.to_dict()
    data["compared"] = [
        {"name": row.name, "predicted": row.predicted_bytes, "counted": row.counted_bytes, "off": row.off}
        for row in report.compared
    ]
    data["stages"] = {stage: _stage_data(breakdown) for stage, breakdown in report.stages.items()}
    data["steps"] = {
        stage: _step_points([step for step in report.steps if step.stage == stage])
        for stage in {step.stage: None for step in report.steps}
    }
    return data


def _stage_data(breakdown: MemoryBreakdown) -> dict[str, Any]:
    """The breakdown with its timeline in columns: a quarter of the size, and quick to draw."""
    data = breakdown.to_dict()
    names = {event.name: None for event in breakdown.timeline}
    number_of = {name: number for number, name in enumerate(names)}
    data["timeline"] = {
        "names": list(names),
        "name": [number_of[event.name] for event in breakdown.timeline],
        "held": {
            category.value: [event.held[category] for event in breakdown.timeline]
            for category in breakdown.at_peak
        },
    }
    return data


def _step_points(steps: list[StepPeak]) -> dict[str, Any]:
    """At most ``_MAX_STEP_POINTS`` of the steps: the highest of each stretch, so that no peak is lost."""
    stretch = -(-len(steps) // _MAX_STEP_POINTS) or 1
    shown = [
        max(steps[start : start + stretch], key=lambda step: step.peak_bytes)
        for start in range(0, len(steps), stretch)
    ]
    return {
        "count": len(steps),
        "step": [step.step for step in shown],
        "peak_bytes": [step.peak_bytes for step in shown],
        "ledger": [step.ledger for step in shown],
    }


def _script_safe_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the ``<script>`` element it stands in, whatever the names in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return (files("lightning_memtrain.report.outputs") / name).read_text(encoding="utf-8")
