"""A snapshot as one self-contained web page without scripts: no network, no other file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from lightning_memtrain.core import GIB, MIB, format_bytes
from lightning_memtrain.report.cuda_snapshot import words
from lightning_memtrain.report.cuda_snapshot.document import CudaSnapshot
from lightning_memtrain.report.cuda_snapshot.summary import SnapshotSummary, summarize
from lightning_memtrain.report.document import write_atomically

_WIDTH, _HEIGHT, _LEFT, _TOP = 1000, 240, 70, 10
# More points than a screen has columns are of no use.
_MAX_POINTS = 900

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<div class="top"><div><p class="overline">CUDA memory snapshot</p><h1>{title}</h1></div></div>
{devices}</main>
</body>
</html>
"""


def render_snapshot_page(snapshot: CudaSnapshot) -> str:
    """Write a snapshot as a page that works from disk.

    Args:
        snapshot: what was read.

    Returns:
        The whole page. It forbids itself any request and any script by its content security policy.
    """
    devices = [_device(summarize(device, snapshot.allocator_settings)) for device in snapshot.devices] or [
        '<section class="card"><p>It holds no memory of any device.</p></section>\n'
    ]
    style = (files("lightning_memtrain.report") / "report.css").read_text(encoding="utf-8")
    return _PAGE.format(title=_text(snapshot.name), style=style, devices="".join(devices))


def save_snapshot_page(snapshot: CudaSnapshot, path: Path) -> None:
    """Write :func:`render_snapshot_page`'s page to ``path``, replacing an older one in one move.

    Args:
        snapshot: what was read.
        path: the file to write.
    """
    write_atomically(path, render_snapshot_page(snapshot))


def _device(summary: SnapshotSummary) -> str:
    failures = [
        _card(
            f"Out of memory, event {failure.event:,}",
            f"<p>{_text(words.shortage(failure))}</p>"
            f'<p class="mono">{_text(words.where(failure.frames, max_frames=12))}</p>',
            kind="card oom",
        )
        for failure in summary.shortages
    ]
    sites = [
        (
            words.where(site.frames),
            _mib(site.num_bytes),
            words.share(site.num_bytes, summary),
            f"{site.num_blocks:,}",
        )
        for site in summary.call_sites
    ]
    blocks = [
        (
            words.where(block.frames),
            _mib(block.num_bytes),
            words.BEFORE if block.event is None else f"event {block.event:,}",
        )
        for block in summary.live
    ]
    cards = [
        *failures,
        _card(f"cuda:{summary.index}", _overview(summary)),
        _card(
            f"Allocated {words.focus(summary)}, by call stack",
            _table(("Where", "MiB", "Share", "Blocks"), sites),
        ),
        _card(f"Largest blocks {words.focus(summary)}", _table(("Where", "MiB", "Made"), blocks)),
    ]
    return "".join(cards)


def _overview(summary: SnapshotSummary) -> str:
    rows = []
    for name, moment in (("at the peak", summary.peak_event), ("at the end", -1)):
        allocated, reserved = summary.allocated_bytes[moment], summary.reserved_bytes[moment]
        rows.append((name, _mib(allocated), _mib(reserved), _mib(reserved - allocated)))
    return (
        f'<div class="headline"><strong>{format_bytes(summary.peak_allocated_bytes)}</strong>'
        f"<span>allocated at most, {format_bytes(summary.peak_reserved_bytes)} reserved; "
        f"{summary.comparison.num_events:,} events were recorded</span></div>"
        f"{_chart(summary)}"
        f"{_table(('MiB', 'Allocated', 'Reserved', 'Not allocated'), rows)}"
        f'<p class="note">{_text(words.free_at_end(summary))}</p>'
        f'<p class="note">{_text(words.certainty(summary))}</p>'
    )


def _card(title: str, content: str, *, kind: str = "card") -> str:
    return f'<section class="{kind}"><h2>{_text(title)}</h2>\n{content}</section>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    lines = []
    for first, *numbers in rows:
        cells = "".join(f"<td>{_text(number)}</td>" for number in numbers)
        lines.append(f'<tr><th class="name">{_text(first)}</th>{cells}</tr>\n')
    return (
        f'<div class="scroll"><table class="data"><thead><tr>{titles}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _chart(summary: SnapshotSummary) -> str:
    """Allocated bytes as an area, reserved bytes as a line above it."""
    top = max(summary.peak_reserved_bytes, summary.peak_allocated_bytes, 1)
    factor, unit = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    last = len(summary.allocated_bytes) - 1
    bottom = _TOP + _HEIGHT

    def at(moment: int, num_bytes: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT) * moment / max(last, 1)
        return f"{x:.1f},{_TOP + _HEIGHT * (1 - num_bytes / top):.1f}"

    area = " ".join(at(*point) for point in _points(summary.allocated_bytes))
    line = " ".join(at(*point) for point in _points(summary.reserved_bytes))
    grid = []
    for level in (0, top / 2, top):
        y = float(at(0, level).partition(",")[2])
        grid.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}"/>')
        label = f"{level / factor:.1f} {unit}"
        grid.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    peak_x, peak_y = at(summary.peak_event, summary.peak_allocated_bytes).split(",")
    allocated, reserved = (
        format_bytes(size) for size in (summary.peak_allocated_bytes, summary.peak_reserved_bytes)
    )
    told = f"Over {last:,} events: allocated bytes up to {allocated}, reserved bytes up to {reserved}."
    return (
        f'<div class="chart"><svg viewBox="0 0 {_WIDTH} {bottom + 26}" role="img" aria-label="{told}">'
        f"{''.join(grid)}"
        f'<polygon points="{_LEFT},{bottom} {area} {_WIDTH},{bottom}" fill="var(--activations)"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--ink)" stroke-width="1.5"/>'
        f'<circle class="peak-dot" cx="{peak_x}" cy="{peak_y}" r="4"/>'
        f'<text x="{_LEFT}" y="{bottom + 18}">event 0</text>'
        f'<text x="{_WIDTH}" y="{bottom + 18}" text-anchor="end">event {last:,}</text></svg></div>\n'
        '<p class="small muted">Area: allocated. Line: reserved. Dot: the peak.</p>\n'
    )


def _points(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """At most ``_MAX_POINTS`` moments: the highest of each stretch, so that no peak is lost."""
    stretch = -(-len(sizes) // _MAX_POINTS)
    moments = range(len(sizes))
    return [
        max(((at, sizes[at]) for at in moments[start : start + stretch]), key=lambda point: point[1])
        for start in moments[::stretch]
    ]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.2f}"


def _text(text: str) -> str:
    return html.escape(text)
