"""A plan as a web page and as a cell of a notebook: no network, no script."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.planning.fit.showing.front_chart import front_svg
from lightning_memtrain.planning.fit.showing.plan_table import (
    floor_lines,
    offers,
    refusal,
    row_of,
    title,
)
from lightning_memtrain.planning.fit.way import FoundWays, Way
from lightning_memtrain.tracing.device import Device

_LINE_WIDTH = 100
# Of a cell, beside the columns of figures.
_CELL_WIDTH = 80

# On a phone the figures of a way stand below it, and the chart can be pushed to the side.
_NARROW_STYLE = (
    "@media (max-width: 640px) {\n"
    ".data tr { display: grid; grid-template-columns: 1fr 1fr 4rem 4rem; }\n"
    ".data td:first-child, .data th:first-child { grid-column: 1 / -1; border-bottom: 0; }\n"
    ".data td:first-child { white-space: normal; }\n"
    ".chart { overflow-x: auto; }\n.chart svg { min-width: 560px; }\n}\n"
)

# For a notebook, whose own colours it takes.
_CELL_STYLE = (
    "<style>.memtrain-plan .grid{stroke:currentColor;opacity:.15}.memtrain-plan text{fill:currentColor;"
    "font-size:11px}.memtrain-plan .steps-line{fill:none;stroke:#0d9488}"
    ".memtrain-plan .steps-dot{fill:#0d9488}"
    ".memtrain-plan .peak-dot{fill:none;stroke:currentColor;stroke-width:2}.memtrain-plan .allocator-peak"
    "{stroke:currentColor;stroke-dasharray:5 4}.memtrain-plan td,.memtrain-plan th{text-align:right;"
    "vertical-align:top}.memtrain-plan pre{text-align:left;margin:0;background:none}</style>"
)


def plan_html(model: str, found: FoundWays, device: Device, limit_bytes: int) -> str:
    """Write a plan for a notebook.

    Args:
        model: the name of the model's class.
        found: what the search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.

    Returns:
        A chart and a table.
    """
    head = html.escape(title(model, found, device, limit_bytes))
    body = "".join(_body(found, device, limit_bytes))
    return f'{_CELL_STYLE}<div class="memtrain-plan"><p><b>{head}</b></p>{body}</div>'


def plan_page(model: str, found: FoundWays, device: Device, limit_bytes: int) -> str:
    """Write a plan as a whole page, in the style of the memory report.

    Args:
        model: the name of the model's class.
        found: what the search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.

    Returns:
        The page. It forbids itself any request by its content security policy.
    """
    style = (files("lightning_memtrain.report.outputs") / "report.css").read_text(encoding="utf-8")
    head = html.escape(title(model, found, device, limit_bytes))
    body = "".join(f'<section class="card">{part}</section>' for part in _body(found, device, limit_bytes))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(f'Plan: {model}')}</title>\n"
        '<link rel="icon" href="data:,">\n'
        f"<style>\n{style}.data td, .data th {{ vertical-align: top; }}\n"
        ".data pre { margin: 0; text-align: left; white-space: pre-wrap; }\n"
        ".data tr.chosen td { background: var(--soft); font-weight: 600; }\n"
        f"{_NARROW_STYLE}</style>\n</head>\n"
        "<body>\n<main>\n"
        f'<p class="overline">Plan</p><h1>{head}</h1><p></p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def save_plan_page(model: str, found: FoundWays, device: Device, limit_bytes: int, path: Path) -> None:
    """Write :func:`plan_page` into a file.

    Args:
        model: the name of the model's class.
        found: what the search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.
        path: the file to write or to replace.
    """
    write_atomically(path, plan_page(model, found, device, limit_bytes))


def _body(found: FoundWays, device: Device, limit_bytes: int) -> list[str]:
    parts = []
    chart = front_svg(found, device, limit_bytes)
    if chart:
        parts.append(f'<h2>Memory against time</h2><div class="chart">{chart}</div>')
    if found.chosen is None:
        words = "".join(
            f"<p>{html.escape(line)}</p>"
            for line in floor_lines(found.floor, found.plain, device, limit_bytes)
        )
        parts.append(f"<h2>What it needs at least</h2>{words}")
    elif not found.chosen.is_plain:
        code = html.escape("\n".join(found.chosen.lines(_LINE_WIDTH)))
        parts.append(f'<h2>Paste into L.Trainer(...)</h2><pre class="mono">{code}</pre>')
    ways = ([found.chosen] if found.chosen else []) + [way for way in found.front if way != found.chosen]
    if found.plain not in ways:
        ways.append(found.plain)
    parts.append(f"<h2>Ways</h2>{_table(ways, found, device)}")
    for words, offered in offers(found):
        parts.append(f"<h2>{words.rstrip(':')}</h2>{_table(offered, found, device)}")
    if found.refused:
        rows = "".join(f"<li>{html.escape(refusal(one))}</li>" for one in found.refused)
        parts.append(f"<h2>Not used</h2><ul>{rows}</ul>")
    if found.notes:
        parts.append("".join(f"<p>{html.escape(note)}</p>" for note in found.notes))
    return parts


def _table(ways: Sequence[Way], found: FoundWays, device: Device) -> str:
    reserved = "<th>Reserved</th>" if device.is_cuda else ""
    head = f"<tr><th>Way</th><th>Allocated</th>{reserved}<th>Time</th><th>Exact</th></tr>"
    rows = "".join(_row(way, way == found.chosen, device) for way in ways)
    table = f'<table class="data"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _row(way: Way, is_chosen: bool, device: Device) -> str:
    row = row_of(way, device, _CELL_WIDTH)
    code = html.escape("\n".join(row.lines))
    remarks = "".join(f"<div>{html.escape(remark)}</div>" for remark in row.remarks)
    reserved = f"<td>{row.reserved}</td>" if device.is_cuda else ""
    kind = ' class="chosen"' if is_chosen else ""
    return (
        f'<tr{kind}><td><pre class="mono">{code}</pre>{remarks}</td><td>{row.allocated}</td>{reserved}'
        f"<td>{row.time}</td><td>{row.exact}</td></tr>"
    )
