"""The Pareto front of bytes and time as a drawing."""

from __future__ import annotations

import html
import math

from lightning_memtrain.core import GIB, MIB, format_bytes
from lightning_memtrain.planning.fit.way import FoundWays, Way
from lightning_memtrain.tracing.device import Device

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 28, 40
_NUM_TICKS = 5
_MOST_RATIO = 5


def front_svg(found: FoundWays, device: Device, limit_bytes: int) -> str:
    """Draw all ways by what they need and how long a step takes, with the limit.

    Args:
        found: what a search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.

    Returns:
        An ``<svg>`` in colours of the page around it; empty if nothing was predicted.
    """
    front = [way for way in found.front if _is_known(way) and _is_of_use(way, found)]
    others = [way for way in (found.plain, *found.offered) if _is_known(way) and way not in front]
    ways = [*front, *others]
    if not ways:
        return ""
    context_bytes = device.context_bytes
    needed = {id(way): (way.reserved_bytes or 0) + context_bytes for way in ways}
    ratios = [way.time_ratio or 0 for way in ways]
    most_bytes = max(*needed.values(), limit_bytes if limit_bytes <= 2 * max(needed.values()) else 0)
    step_bytes, unit = _tick_bytes(most_bytes)
    right = step_bytes * math.ceil(most_bytes / step_bytes)
    low, high = min(*ratios, 1.0), max(*ratios, 1.0)
    margin = max(0.05, 0.12 * (high - low))
    low, high = low - margin, high + margin

    def x(num_bytes: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * num_bytes / right, 1)

    def y(ratio: float) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (ratio - low) / (high - low), 1)

    bottom, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Time of a step against memory, one point for each way">'
    ]
    for place in range(round(right / step_bytes) + 1):
        at = x(place * step_bytes)
        label = f"{place * step_bytes / unit:g}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    for ratio in _ratio_ticks(low, high):
        at = y(ratio)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{end}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{ratio:.2f}</text>')
    parts.append(
        f'<text x="{end}" y="{_HEIGHT - 6}" text-anchor="end">{"GiB" if unit == GIB else "MiB"} needed</text>'
        f'<text x="{_LEFT}" y="14">time of a step, over that of the plain run</text>'
    )
    if limit_bytes <= right:
        at = x(limit_bytes)
        side = "end" if at > _WIDTH / 2 else "start"
        shift = -5 if side == "end" else 5
        parts.append(f'<line class="allocator-peak" x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="strong" x="{at + shift}" y="{_TOP + 10}" text-anchor="{side}">'
            f"limit {format_bytes(limit_bytes)}</text>"
        )
    line = " ".join(f"{x(needed[id(way)])},{y(way.time_ratio or 0)}" for way in front)
    parts.append(f'<polyline class="steps-line" points="{line}"/>')
    for way in ways:
        is_chosen = way == found.chosen
        mark = 'class="peak-dot" r="7"' if is_chosen else 'class="steps-dot" r="4"'
        about = f"{way}: {format_bytes(needed[id(way)])}, {way.time_ratio:.2f} times the time"
        opacity = "" if way in front else ' opacity=".4"'
        parts.append(
            f'<circle {mark}{opacity} cx="{x(needed[id(way)])}" cy="{y(way.time_ratio or 0)}">'
            f"<title>{html.escape(about)}</title></circle>"
        )
    return "".join([*parts, "</svg>"])


def _is_of_use(way: Way, found: FoundWays) -> bool:
    """Whether it is drawn: what takes many times as long would press all others together."""
    return way in (found.chosen, found.plain) or (way.time_ratio or 0) <= _MOST_RATIO


def _is_known(way: Way) -> bool:
    return way.reserved_bytes is not None and way.time_ratio is not None


def _tick_bytes(most_bytes: int) -> tuple[float, int]:
    """Bytes from one line of the grid to the next: 1, 2 or 5 times a power of ten of the unit."""
    unit = GIB if most_bytes >= 2 * GIB else MIB
    step = most_bytes / unit / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(step))
    return next(one * power for one in (1, 2, 5, 10) if one * power >= step) * unit, unit


def _ratio_ticks(low: float, high: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(one * power for one in (1, 2, 5, 10) if (high - low) / (one * power) <= 6)
    first = math.ceil(low / step)
    return [round(place * step, 2) for place in range(first, math.floor(high / step) + 1)]
