"""The timeline of a step as one stacked chart, for where no script may run."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from lightning_memtrain.core import Category, MemoryBreakdown, TimelineEvent, format_bytes

_WIDTH, _HEIGHT = 960, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 12, 14, 26
# More points than the chart has columns are of no use.
_MAX_POINTS = 880
# From the bottom to the top, as the page stacks them: what stays, then what comes and goes.
_STACK = (
    *(Category.PARAMETERS, Category.BUFFERS, Category.HELD, Category.OPTIMIZER_STATE, Category.GRADIENTS),
    *(Category.BUCKETS, Category.INPUTS, Category.GATHERED_WEIGHTS, Category.UNSHARDED_GRADIENTS),
    *(Category.ACTIVATIONS, Category.TEMPORARY),
)


def render_timeline(breakdown: MemoryBreakdown) -> str:
    """Draw bytes by category over the events of a step, stacked.

    Args:
        breakdown: of a step, with its timeline.

    Returns:
        A whole page, which needs no network and no script.
    """
    style = (files("lightning_memtrain.report.outputs") / "report.css").read_text(encoding="utf-8")
    events = _points(breakdown.timeline)
    top = max(event.held.total_bytes for event in events) or 1
    shown = [category for category in _STACK if any(event.held[category] for event in events)]
    peak = max(events, key=lambda event: event.held.total_bytes)
    areas = "".join(_area(events, shown, index, top) for index in range(len(shown)))
    legend = "".join(
        f'<span><i class="swatch" style="background:var(--{category.value})"></i> '
        f"{category.value.replace('_', ' ')}</span> "
        for category in reversed(shown)
    )
    labels = "".join(
        f'<path class="grid" d="M{_LEFT} {_y(size, top):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{_y(size, top) + 4:.1f}" text-anchor="end">{format_bytes(size)}</text>'
        for size in (top * quarter // 4 for quarter in range(5))
    )
    title = f"Bytes by category over one step; the peak is {format_bytes(top)}, {peak.name}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Timeline</title><style>{style}'
        "body{padding:12px}.keys span{margin-right:14px;white-space:nowrap}</style>"
        f'<div class="chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{labels}{areas}<text x="{_LEFT}" y="{_HEIGHT - 8}">first event</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">last of '
        f"{len(breakdown.timeline):,} events</text></svg></div>"
        f'<p class="keys small">{legend}</p><p class="small muted">{escape(title)}</p></html>'
    )


def _points(events: tuple[TimelineEvent, ...]) -> list[TimelineEvent]:
    """The highest of each stretch, so that the peak is there."""
    stretch = -(-len(events) // _MAX_POINTS) or 1
    return [
        max(events[start : start + stretch], key=lambda event: event.held.total_bytes)
        for start in range(0, len(events), stretch)
    ]


def _y(size: int, top: int) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * size / top


def _area(events: list[TimelineEvent], shown: list[Category], index: int, top: int) -> str:
    """One category above all that lie below it; each event's bytes last until the next one."""
    width = (_WIDTH - _LEFT - _RIGHT) / len(events)
    lower = [sum(event.held[category] for category in shown[:index]) for event in events]
    upper = [low + event.held[shown[index]] for low, event in zip(lower, events, strict=True)]
    there, back = [], []
    for place, (low, high) in enumerate(zip(lower, upper, strict=True)):
        for x in (_LEFT + place * width, _LEFT + (place + 1) * width):
            there.append(f"{x:.1f} {_y(high, top):.1f}")
            back.append(f"{x:.1f} {_y(low, top):.1f}")
    points = "L".join([*there, *reversed(back)])
    name = shown[index].value
    return f'<path style="fill:var(--{name})" d="M{points}Z"><title>{name.replace("_", " ")}</title></path>'
