"""A plan as text of at most 80 columns, and the rows that the page and the notebook show, too."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from lightning_memtrain.core import format_bytes
from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.way import Floor, FoundWays, Refused, Way
from lightning_memtrain.tracing.device import Device

WIDTH = 80

#: Ways of the front, and of those that were not allowed, that a table shows.
MOST_ROWS = 8

OFFERED = "Would fit as well, but changes the result, which was not allowed:"
BY_HAND = "Would fit with a line of yours in the model:"

_UNKNOWN = "?"


@dataclass(frozen=True)
class Row:
    """One way as it is shown.

    Args:
        way: the way.
        allocated: predicted peak.
        reserved: predicted peak; empty where nothing is taken ahead.
        time: over that of the plain run.
        exact: yes or no.
        lines: what to paste.
        remarks: what it changes.
        chosen: whether it is the one to take.
    """

    way: Way
    allocated: str
    reserved: str
    time: str
    exact: str
    lines: tuple[str, ...]
    remarks: tuple[str, ...]
    chosen: bool = False


def row_of(way: Way, device: Device, width: int, chosen: bool = False) -> Row:
    """Say what is known of a way.

    Args:
        way: any.
        device: what it runs on.
        width: most characters in a line of code.
        chosen: whether it is the one to take.

    Returns:
        The row.
    """
    return Row(
        way=way,
        allocated=_size(way.allocated_bytes),
        reserved=_size(way.reserved_bytes) if device.is_cuda else "",
        time=_UNKNOWN if way.time_ratio is None else f"{way.time_ratio:.2f}",
        exact="yes" if way.exact else "no",
        lines=entries(way, width) or ("nothing: as it is",),
        remarks=way.changes,
        chosen=chosen,
    )


def entries(way: Way, width: int) -> tuple[str, ...]:
    """What to paste for a way, without the names of the lists that it belongs into.

    Args:
        way: any.
        width: most characters in a line, as far as names allow.

    Returns:
        The lines.
    """
    inner = [line for line in way.lines(width + 4) if line not in ("callbacks=[", "plugins=[", "],")]
    return tuple(line.removeprefix("    ") for line in inner)


def shown_front(found: FoundWays) -> tuple[Way, ...]:
    """The ways of the front that a table shows besides the chosen one: evenly spread, both ends among them.

    Args:
        found: what a search came to.

    Returns:
        At most :data:`MOST_ROWS` ways, most bytes first.
    """
    others = [way for way in found.front if way != found.chosen]
    if len(others) <= MOST_ROWS:
        return tuple(others)
    step = (len(others) - 1) / (MOST_ROWS - 1)
    return tuple(others[round(place * step)] for place in range(MOST_ROWS))


def offers(found: FoundWays) -> list[tuple[str, list[Way]]]:
    """What is offered and not taken.

    Args:
        found: what a search came to.

    Returns:
        Why it is not taken, and the ways; none of neither kind where there are none.
    """
    changing = [way for way in found.offered if not way.by_hand]
    by_hand = [way for way in found.offered if way.by_hand]
    return [(words, ways) for words, ways in ((OFFERED, changing), (BY_HAND, by_hand)) if ways]


def title(model: str, found: FoundWays, device: Device, limit_bytes: int) -> str:
    """What came of it, in one sentence.

    Args:
        model: the name of the model's class.
        found: what the search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.

    Returns:
        The sentence.
    """
    batch = "" if found.batch_size is None else f", batches of {found.batch_size}"
    head = f"{model} on {device.name}{batch}, limit {format_bytes(limit_bytes)}"
    if found.chosen is None:
        return f"{head}: does not fit"
    if found.chosen.reserved_bytes is None:
        return f"{head}: edited by hand, not predicted"
    if found.chosen.reserved_bytes + device.context_bytes > limit_bytes:
        return f"{head}: edited by hand, does not fit"
    if found.chosen.is_plain:
        return f"{head}: fits as it is"
    ratio = found.chosen.time_ratio
    return f"{head}: fits" + ("" if ratio is None else f", a step takes {ratio:.2f} times as long")


def plan_text(model: str, found: FoundWays, device: Device, limit_bytes: int) -> str:
    """Write a plan as a table for the terminal.

    Args:
        model: the name of the model's class.
        found: what the search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.

    Returns:
        Lines of at most :data:`WIDTH` characters, as far as names allow.
    """
    lines = textwrap.wrap(title(model, found, device, limit_bytes), WIDTH)
    if found.chosen is None:
        lines += ["", *floor_lines(found.floor, found.plain, device, limit_bytes)]
    lines += ["", *_table(found, device)]
    rest = len(found.front) - len(shown_front(found)) - (found.chosen in found.front)
    if rest > 0:
        lines.append(f"  {rest} more in `plan.front`")
    if found.chosen is not None and not found.chosen.is_plain:
        lines += ["", "Paste into `L.Trainer(...)`, after `import lightning_memtrain as mt`:"]
        lines += [f"    {line}" for line in found.chosen.lines(WIDTH - 4)]
    for words, ways in offers(found):
        lines += ["", words]
        lines += _rows([row_of(way, device, _code_width(device)) for way in ways[:MOST_ROWS]], device)
    if found.refused:
        lines += ["", "Not used:"]
        lines += [line for one in found.refused for line in _wrapped(refusal(one), "  ", "    ")]
    lines += [line for note in found.notes for line in ("", *_wrapped(note, "", ""))]
    return "\n".join(lines)


def refusal(one: Refused) -> str:
    """What was not used, and why, in one sentence.

    Args:
        one: what was refused.

    Returns:
        The sentence.
    """
    permission = PERMISSIONS.get(one.allow)
    cure = f" (allow={(one.allow,)!r}; {permission.accuracy})" if permission else ""
    return f"{one.what}: {one.why}{cure}"


def floor_lines(floor: Floor, plain: Way, device: Device, limit_bytes: int) -> list[str]:
    """Say what the run needs at least, what holds it, and what to allow.

    Args:
        floor: the least.
        plain: the run as it is.
        device: what the run uses.
        limit_bytes: the most that it may use.

    Returns:
        The lines.
    """
    context_bytes = device.context_bytes
    least_bytes = (floor.way.reserved_bytes or 0) + context_bytes
    plain_bytes = (plain.reserved_bytes or 0) + context_bytes
    how = "as it is" if floor.way.is_plain else f"by {floor.way}"
    context = f", {format_bytes(context_bytes)} of it CUDA's own" if context_bytes else ""
    lines = _wrapped(
        f"It needs at least {format_bytes(least_bytes)} ({how}){context}; {format_bytes(plain_bytes)} as it "
        f"is. That is {format_bytes(least_bytes - limit_bytes)} more than the limit.",
        "",
        "",
    )
    if floor.held:
        held = ", ".join(f"{name.replace('_', ' ')} {format_bytes(num)}" for name, num in floor.held)
        lines += _wrapped(f"Held then: {held}.", "", "")
    for name, num in floor.unlocks:
        fits = "fits" if num <= limit_bytes else "still too much"
        allow = tuple(name.split(","))
        lines += _wrapped(f"With allow={allow!r} at least {format_bytes(num)}: {fits}.", "", "  ")
    return lines


# ------------------------------------------------------------------ columns


def _code_width(device: Device) -> int:
    return WIDTH - len(_figures("", "", "", "", "", device))


def _figures(mark: str, allocated: str, reserved: str, time: str, exact: str, device: Device) -> str:
    both = f"{allocated:>10} {reserved:>10}" if device.is_cuda else f"{allocated:>10}"
    return f"{mark:<3}{both} {time:>5} {exact:>5}  "


def _table(found: FoundWays, device: Device) -> list[str]:
    head = _figures("", "Allocated", "Reserved", "Time", "Exact", device)
    chosen = [row_of(found.chosen, device, _code_width(device), chosen=True)] if found.chosen else []
    others = [row_of(way, device, _code_width(device)) for way in shown_front(found)]
    if not any(way.is_plain for way in (*found.front, *filter(None, [found.chosen]))):
        others.insert(0, row_of(found.plain, device, _code_width(device)))
    return [f"{head}Way", *_rows([*chosen, *others], device)]


def _rows(rows: list[Row], device: Device) -> list[str]:
    lines = []
    for row in rows:
        mark = "->" if row.chosen else ""
        figures = _figures(mark, row.allocated, row.reserved, row.time, row.exact, device)
        indent = " " * len(figures)
        first, *rest = row.lines
        lines += [f"{figures}{first}", *(f"{indent}{line}" for line in rest)]
        lines += [line for remark in row.remarks for line in _wrapped(f"({remark})", indent, f"{indent} ")]
    return lines


def _size(num_bytes: int | None) -> str:
    return _UNKNOWN if num_bytes is None else format_bytes(num_bytes)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
