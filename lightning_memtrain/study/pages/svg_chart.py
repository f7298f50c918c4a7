"""Charts as SVG: points on two axes, with lines, spreads and names where there is room for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 320
_LEFT, _RIGHT, _BOTTOM = 58, 14, 44
_CHARACTER = 6.3  # width of one, in the mean, of the 11 pixels that names are high
_NUM_COLOURS = 11
#: From this quotient of the largest and the smallest value on, an axis is logarithmic.
_LOGARITHMIC_FROM = 4


@dataclass(frozen=True)
class Point:
    """Something with two numbers.

    Args:
        name: written beside it if there is room, and shown when it is pointed at.
        x: across.
        y: upwards.
        group: points of one group have one colour.
        spread: how far ``y`` is uncertain, up and down.
        details: shown when it is pointed at.
        label: whether its name is written; ``None`` for the name, or another text.
        faint: whether it is only there to be compared with.
    """

    name: str
    x: float
    y: float
    group: str = ""
    spread: float = 0.0
    details: str = ""
    label: str | None = None
    faint: bool = False


@dataclass(frozen=True)
class Line:
    """Points that are joined.

    Args:
        points: in order.
        group: whose colour it has; ``None`` for a dashed line in the colour of text.
    """

    points: Sequence[Point]
    group: str | None = None


@dataclass
class _Boxes:
    """What is taken already, so that names do not lie on each other."""

    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def fits(self, box: tuple[float, float, float, float]) -> bool:
        left, top, right, bottom = box
        return all(
            right <= other_left or left >= other_right or bottom <= other_top or top >= other_bottom
            for other_left, other_top, other_right, other_bottom in self.taken
        )


def scatter(
    title: str,
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    *,
    lines: Sequence[Line] = (),
    colours: Sequence[str] = (),
) -> str:
    """Draw points.

    Args:
        title: for readers that do not see it.
        points: at least one.
        x_label: what is across, with its unit; the axis is logarithmic if the values differ much.
        y_label: what is upwards, likewise.
        lines: drawn below the points.
        colours: groups in the order of their colours, so that a group has the same one in all charts; those
            that are not among them come after.

    Returns:
        An ``svg`` element, whose colours are variables of CSS.
    """
    found = list(dict.fromkeys(point.group for point in points if point.group and not point.faint))
    groups = [*colours, *(group for group in found if group not in colours)]
    legend, top = _legend(groups, [group for group in groups if group in found])
    xs = [point.x for point in points]
    ys = [point.y + side * point.spread for point in points for side in (-1, 1)]
    across, x_ticks = _axis(xs, _LEFT + 12, WIDTH - _RIGHT - 12)
    up, y_ticks = _axis(ys, HEIGHT - _BOTTOM - 10, top + 10)
    parts = [*legend]
    for value in x_ticks:
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{HEIGHT - _BOTTOM}"/>')
        parts.append(_text(x, HEIGHT - _BOTTOM + 15, _number(value), "middle"))
    for value in y_ticks:
        y = up(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _number(value), "end"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, x_label, "middle", "strong"))
    middle = (top + HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="strong" transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for line in lines:
        path = "L".join(f"{across(point.x):.1f} {up(point.y):.1f}" for point in line.points)
        style = "front" if line.group is None else f"series s{_colour(groups, line.group)}"
        parts.append(f'<path class="{style}" d="M{path}"/>')
    boxes = _Boxes([(across(p.x) - 5, up(p.y) - 5, across(p.x) + 5, up(p.y) + 5) for p in points])
    for point in sorted(points, key=lambda point: not point.faint):
        parts.append(_dot(point, across(point.x), up(point.y), up, groups))
    for point in points:
        parts += _label(point, across(point.x), up(point.y), boxes, top)
    return svg(title, HEIGHT, parts)


def svg(title: str, height: float, parts: Iterable[str]) -> str:
    """Put parts into an ``svg`` element of the usual width."""
    return (
        f'<svg class="figure" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _legend(groups: Sequence[str], found: Sequence[str]) -> tuple[list[str], float]:
    """The groups that there are in rows above the chart, and where the chart begins."""
    parts: list[str] = []
    x, y = float(_LEFT), 12.0
    if len(found) < 2:
        return parts, 10.0
    for group in found:
        width = 22 + len(group) * _CHARACTER
        if x + width > WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 16
        parts.append(f'<circle class="dot s{_colour(groups, group)}" cx="{x + 5:.1f}" cy="{y - 4}" r="4.5"/>')
        parts.append(_text(x + 13, y, group, "start"))
        x += width
    return parts, y + 12


def _axis(
    values: Sequence[float], start: float, end: float
) -> tuple[Callable[[float], float], Sequence[float]]:
    """A scale from values to pixels, and where it has ticks."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOGARITHMIC_FROM:
        powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        stretch = -(-len(powers) // 7)
        ticks = [2.0**power for power in powers if power % stretch == 0]
        first, last = math.log2(low), math.log2(high)

        def logarithmic(value: float) -> float:
            return start + (math.log2(value) - first) / (last - first) * (end - start)

        return logarithmic, [tick for tick in ticks if low <= tick <= high]
    if high == low:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    ticks = [round(step * count, 10) for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: start + (value - low) / (high - low) * (end - start), ticks


def _colour(groups: Sequence[str], group: str) -> int:
    return groups.index(group) % _NUM_COLOURS if group in groups else _NUM_COLOURS  # grey


def _dot(point: Point, x: float, y: float, up: Callable[[float], float], groups: Sequence[str]) -> str:
    style = "faint" if point.faint else f"s{_colour(groups, point.group)}"
    parts = []
    if point.spread and not point.faint:
        high, low = up(point.y + point.spread), up(point.y - point.spread)
        parts.append(f'<path class="spread {style}" d="M{x:.1f} {high:.1f}V{low:.1f}"/>')
    text = escape(f"{point.name}: {point.details}" if point.details else point.name)
    radius = 3 if point.faint else 4.5
    parts.append(
        f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{text}</title></circle>'
    )
    return "".join(parts)


def _label(point: Point, x: float, y: float, boxes: _Boxes, top: float) -> list[str]:
    """The name at the first place beside the point that is free, or nowhere."""
    text = point.name if point.label is None else point.label
    if not text:
        return []
    width = len(text) * _CHARACTER
    places = [(8, 4, "start"), (-8, 4, "end"), (0, -9, "middle"), (0, 17, "middle")]
    places += [(7, -7, "start"), (-7, -7, "end"), (7, 15, "start"), (-7, 15, "end")]
    for shift, drop, anchor in places:
        left = x + shift - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left, y + drop - 10, left + width, y + drop + 3)
        inside = box[0] >= _LEFT and box[2] <= WIDTH and box[1] >= top and box[3] <= HEIGHT - _BOTTOM
        if inside and boxes.fits(box):
            boxes.taken.append(box)
            style = "" if point.faint else "label"
            return [_text(x + shift, y + drop, text, anchor, style)]
    return []


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 10_000 else f"{value:,.0f}"
