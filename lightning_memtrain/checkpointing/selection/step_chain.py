"""A step that recomputes nothing as a chain of stages, and what comes of recomputing some of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from lightning_memtrain.core import ArgumentError

Path = tuple[int, ...]
"""Where a stage is: indices from the chain down to a part."""


@dataclass(frozen=True)
class ChainStage:
    """A part of a step that recomputes nothing; its peaks and its start are all bytes that are live then.

    Args:
        name: path of the module; ``None`` for a gap, which cannot be recomputed.
        forward_peak_bytes: most live bytes while its forward runs.
        backward_peak_bytes: most live bytes while its backward runs.
        internal_bytes: what is live between its forward and its backward for its own backward only.
        boundary_bytes: its input, if that is alive after its forward for it only; freed where it is
            recomputed together with the stage before it.
        backward_start_bytes: live bytes when its backward begins.
        own_peak_bytes: most bytes born in its own forward that are live at once.
        seconds: time to run its forward again, as far as its backward needs it.
        tail_seconds: time of the rest, which runs, too, if something is recomputed behind it in its segment.
        opening_bytes: what has to be kept for it to be the first of a segment and would not be there
            otherwise: a copy of an input that it changes, or an input that nothing else needs so long.
        parts: the same part in finer stages, gaps included, in order. They stand for the stage unless it is
            recomputed itself.

    Raises:
        ArgumentError: if a number is negative or not finite.
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
    parts: tuple[ChainStage, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "parts") and not 0 <= value < math.inf:
                raise ArgumentError(
                    f"`ChainStage({field.name})` must be a finite number of at least 0, but got "
                    f"{field.name}={value!r} for the stage {self.name!r}. Profile the step again."
                )


@dataclass(frozen=True)
class CheckpointSchedule:
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


def simulate(chain: Sequence[ChainStage], segments: Sequence[Sequence[str]]) -> CheckpointSchedule:
    """Follow the live bytes of a step through time, given what is recomputed.

    Args:
        chain: the step without recomputation.
        segments: names that are recomputed together, in order. They must follow each other directly in the
            chain or in the parts of one stage; a module that is called several times must be alone.

    Returns:
        The choice with its peak and its seconds.

    Raises:
        ArgumentError: if the segments cannot be recomputed.
    """
    runs = _runs(chain, segments)
    recomputed = {path for run in runs for path in run}
    steps = dict(_steps(chain, recomputed))
    start = {path: moment for moment, path in enumerate(steps)}
    end = 2 * len(steps) - 1  # what runs forward at one moment runs backward at end - moment
    live = [(start[path], stage.forward_peak_bytes) for path, stage in steps.items()]
    live += [(end - start[path], stage.backward_peak_bytes) for path, stage in steps.items()]
    freed: list[tuple[int, int, int]] = []
    for run in runs:
        again = end - start[run[-1]]
        missing = 0  # of what the segment freed, while the member runs again
        for path in reversed(run):
            stage = steps[path]
            missing += stage.internal_bytes
            live.append((again, steps[run[-1]].backward_start_bytes - missing + stage.own_peak_bytes))
            missing += stage.boundary_bytes
            freed.append((start[path], again, stage.internal_bytes))
            if path != run[0]:
                freed.append((start[path], again, stage.boundary_bytes))
        opening = steps[run[0]].opening_bytes  # kept beside, until the backward of the first member is over
        freed.append((start[run[0]], end - start[run[0]] + 1, -opening))
    peak = max(
        (num - sum(gone for since, until, gone in freed if since < now < until) for now, num in live),
        default=0,
    )
    tails = (steps[path].tail_seconds for run in runs for path in run[:-1])
    seconds = math.fsum((*(steps[path].seconds for path in recomputed), *tails))
    return CheckpointSchedule(peak, seconds, tuple(map(tuple, segments)))


def all_stages(chain: Sequence[ChainStage], above: Path = ()) -> Iterator[tuple[Path, ChainStage]]:
    """All stages and parts, outer ones first."""
    for index, stage in enumerate(chain):
        yield (*above, index), stage
        yield from all_stages(stage.parts, (*above, index))


def _steps(
    chain: Sequence[ChainStage], recomputed: set[Path], above: Path = ()
) -> Iterator[tuple[Path, ChainStage]]:
    """What runs one after the other: a stage, or, unless it is recomputed, its parts."""
    for index, stage in enumerate(chain):
        path = (*above, index)
        if stage.parts and path not in recomputed:
            yield from _steps(stage.parts, recomputed, path)
        else:
            yield path, stage


def _runs(chain: Sequence[ChainStage], segments: Sequence[Sequence[str]]) -> list[list[Path]]:
    """Where the segments lie; each call of a module that is called several times is a run of its own."""
    calls: dict[str | None, list[Path]] = {}
    for path, stage in all_stages(chain):
        calls.setdefault(stage.name, []).append(path)
    runs: list[list[Path]] = []
    owner: dict[Path, str] = {}
    for segment in segments:
        for name in segment:
            if name is None or name not in calls:
                raise ArgumentError(f"`simulate(segments)` must name stages of the chain, but got {name!r}.")
            if calls[name][0] in owner:
                raise ArgumentError(f"`simulate(segments)` must name a stage once, but got {name!r} again.")
            owner |= dict.fromkeys(calls[name], name)
        run = [path for name in segment for path in calls[name]]
        neighbours = [(*run[0][:-1], run[0][-1] + offset) for offset in range(len(run))] if run else []
        if len(segment) == 1:
            runs += [[path] for path in run]
        elif run and len(run) == len(segment) and run == neighbours:
            runs.append(run)
        else:
            raise ArgumentError(
                "A segment of `simulate(segments)` must be one stage, or stages that are called once and "
                f"follow each other directly in one chain, but got {tuple(segment)!r}. Split it."
            )
    for path, name in owner.items():
        for depth in range(1, len(path)):
            if path[:depth] in owner:
                raise ArgumentError(
                    "`simulate(segments)` must not name a stage within another one that it names, but got "
                    f"{name!r} within {owner[path[:depth]]!r}. Leave one of them out."
                )
    return runs
