"""Charts of measured numbers for the docs, as SVG: lines and points on two axes, nothing more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 420, 64, 20, 16, 52
_COLOURS = ("#3465a4", "#cc5500", "#2e8b57", "#8e44ad", "#b8860b", "#555555", "#c2185b", "#17a2b8")


def save_chart(
    name: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = False,
) -> Path:
    """Write ``docs/images/<name>.svg``.

    Args:
        name: of the file, without its ending.
        series: points ``(x, y)`` of each; those of several points are joined by a line.
        x_label: what the horizontal axis shows, with its unit.
        y_label: likewise of the vertical axis, which begins at 0 unless it is logarithmic.
        logarithmic: whether both axes are.

    Returns:
        The path of the file.
    """
    scale = math.log10 if logarithmic else float
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low_x, high_x = scale(min(xs)), scale(max(xs))
    low_y, high_y = (scale(min(ys)) if logarithmic else 0.0), scale(max(ys)) * (1 if logarithmic else 1.05)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - low_x) / (high_x - low_x)
        up = (scale(y) - low_y) / (high_y - low_y)
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return round(_LEFT + across * width, 1), round(_HEIGHT - _BOTTOM - up * height, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
    ]
    bottom, left = _HEIGHT - _BOTTOM, _LEFT
    for x in _ticks(min(xs), max(xs), logarithmic):
        at, _ = place(x, max(ys))
        parts.append(f'<path d="M{at} {_TOP}V{bottom}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle" fill="#444">{x:g}</text>')
    for y in _ticks(min(ys) if logarithmic else 0.0, max(ys), logarithmic):
        _, at = place(max(xs), y)
        parts.append(f'<path d="M{left} {at}H{_WIDTH - _RIGHT}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4}" text-anchor="end" fill="#444">{y:g}</text>')
    for index, (label, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        placed = [place(x, y) for x, y in points]
        if len(placed) > 1:
            line = "L".join(f"{x} {y}" for x, y in placed)
            parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(placed) < 20:
            parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in placed]
        row = _TOP + 14 + 18 * index
        parts.append(f'<rect x="{_WIDTH - 232}" y="{row - 9}" width="12" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{_WIDTH - 214}" y="{row}" fill="#222">{escape(label)}</text>')
    middle = (_TOP + bottom) / 2
    parts += [
        f'<text x="{(left + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle" fill="#222">'
        f"{escape(x_label)}</text>",
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle" fill="#222">'
        f"{escape(y_label)}</text>",
        "</svg>",
    ]
    path = IMAGES / f"{name}.svg"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if logarithmic:
        first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
        return [2.0**power for power in range(first, last + 1)]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 7)
    return [round(step * count, 10) for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
