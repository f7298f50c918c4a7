"""A step that recomputes nothing as a chain of items, and what comes of recomputing some of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

Path = tuple[int, ...]
"""Where an item is: indices from the chain down to a part."""


@dataclass(frozen=True)
class Item:
    """A stretch of a step that recomputes nothing; its peaks and its start are all bytes that are live then.

    Args:
        name: path of the module; ``None`` for a gap, which cannot be recomputed.
        forward_peak_bytes: most live bytes while its forward runs.
        backward_peak_bytes: most live bytes while its backward runs.
        internal_bytes: what is live between its forward and its backward for its own backward only.
        boundary_bytes: its input, if that is alive after its forward for it only; freed where it is
            recomputed together with the item before it.
        backward_start_bytes: live bytes when its backward begins.
        own_peak_bytes: most bytes born in its own forward that are live at once.
        seconds: time to run its forward again, as far as its backward needs it.
        tail_seconds: time of the rest, which runs, too, if something is recomputed behind it in its segment.
        opening_bytes: what has to be kept for it to be the first of a segment and would not be there
            otherwise: a copy of an input that it changes, or an input that nothing else needs so long.
        parts: the same stretch in finer items, gaps included, in order. They stand for the item unless it is
            recomputed itself.

    Raises:
        ValueError: if a number is negative or not finite.
    """

    name: str | None
    forward_peak_bytes: int
    backward_peak_bytes: int
    internal_bytes: int = 0
    boundary_bytes: int = 0
    backward_start_bytes: int = 0
    own_peak_bytes: int = 0
    seconds: float = 0.0
    tail_seconds: float = 0.0
    opening_bytes: int = 0
    parts: tuple[Item, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "parts") and not 0 <= value < math.inf:
                raise ValueError(
                    f"`Item({field.name})` must be a finite number of at least 0, but got "
                    f"{field.name}={value!r} for the item {self.name!r}. Profile the step again."
                )


@dataclass(frozen=True)
class Choice:
    """What to recompute, and what comes of it.

    Args:
        peak_bytes: most live bytes of the step.
        seconds: time that recomputation adds to the step.
        segments: names that are recomputed together, in order; a module that is called several times is
            recomputed alone, at each call. ``()`` recomputes nothing.
    """

    peak_bytes: int
    seconds: float
    segments: tuple[tuple[str, ...], ...]


def simulate(chain: Sequence[Item], segments: Sequence[Sequence[str]]) -> Choice:
    """Follow the live bytes of a step through time, given what is recomputed.

    Args:
        chain: the step without recomputation.
        segments: names that are recomputed together, in order. They must follow each other directly in the
            chain or in the parts of one item; a module that is called several times must be alone.

    Returns:
        The choice with its peak and its seconds.

    Raises:
        ValueError: if the segments cannot be recomputed.
    """
    runs = _runs(chain, segments)
    recomputed = {path for run in runs for path in run}
    steps = dict(_steps(chain, recomputed))
    start = {path: moment for moment, path in enumerate(steps)}
    end = 2 * len(steps) - 1  # what runs forward at one moment runs backward at end - moment
    live = [(start[path], item.forward_peak_bytes) for path, item in steps.items()]
    live += [(end - start[path], item.backward_peak_bytes) for path, item in steps.items()]
    freed: list[tuple[int, int, int]] = []
    for run in runs:
        again = end - start[run[-1]]
        missing = 0  # of what the segment freed, while the member runs again
        for path in reversed(run):
            item = steps[path]
            missing += item.internal_bytes
            live.append((again, steps[run[-1]].backward_start_bytes - missing + item.own_peak_bytes))
            missing += item.boundary_bytes
            freed.append((start[path], again, item.internal_bytes))
            if path != run[0]:
                freed.append((start[path], again, item.boundary_bytes))
        opening = steps[run[0]].opening_bytes  # kept beside, until the backward of the first member is over
        freed.append((start[run[0]], end - start[run[0]] + 1, -opening))
    peak = max(
        (num - sum(gone for since, until, gone in freed if since < now < until) for now, num in live),
        default=0,
    )
    tails = (steps[path].tail_seconds for run in runs for path in run[:-1])
    seconds = math.fsum((*(steps[path].seconds for path in recomputed), *tails))
    return Choice(peak, seconds, tuple(map(tuple, segments)))


def all_items(chain: Sequence[Item], above: Path = ()) -> Iterator[tuple[Path, Item]]:
    """All items and parts, outer ones first."""
    for index, item in enumerate(chain):
        yield (*above, index), item
        yield from all_items(item.parts, (*above, index))


def _steps(chain: Sequence[Item], recomputed: set[Path], above: Path = ()) -> Iterator[tuple[Path, Item]]:
    """What runs one after the other: an item, or, unless it is recomputed, its parts."""
    for index, item in enumerate(chain):
        path = (*above, index)
        if item.parts and path not in recomputed:
            yield from _steps(item.parts, recomputed, path)
        else:
            yield path, item


def _runs(chain: Sequence[Item], segments: Sequence[Sequence[str]]) -> list[list[Path]]:
    """Where the segments lie; each call of a module that is called several times is a run of its own."""
    calls: dict[str | None, list[Path]] = {}
    for path, item in all_items(chain):
        calls.setdefault(item.name, []).append(path)
    runs: list[list[Path]] = []
    owner: dict[Path, str] = {}
    for segment in segments:
        for name in segment:
            if name is None or name not in calls:
                raise ValueError(f"`simulate(segments)` must name items of the chain, but got {name!r}.")
            if calls[name][0] in owner:
                raise ValueError(f"`simulate(segments)` must name an item once, but got {name!r} again.")
            owner |= dict.fromkeys(calls[name], name)
        run = [path for name in segment for path in calls[name]]
        neighbours = [(*run[0][:-1], run[0][-1] + offset) for offset in range(len(run))] if run else []
        if len(segment) == 1:
            runs += [[path] for path in run]
        elif run and len(run) == len(segment) and run == neighbours:
            runs.append(run)
        else:
            raise ValueError(
                "A segment of `simulate(segments)` must be one item, or items that are called once and "
                f"follow each other directly in one chain, but got {tuple(segment)!r}. Split it."
            )
    for path, name in owner.items():
        for depth in range(1, len(path)):
            if path[:depth] in owner:
                raise ValueError(
                    "`simulate(segments)` must not name an item within another one that it names, but got "
                    f"{name!r} within {owner[path[:depth]]!r}. Leave one of them out."
                )
    return runs
