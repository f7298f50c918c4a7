"""The memory report of a run as a frozen record, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_memtrain.core import ArgumentError, Growth, MemoryBreakdown, TechniqueRecord
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.core.notebooks import framed, show
from lightning_memtrain.core.units import format_bytes, format_seconds
from lightning_memtrain.report.predicted.predicted_step import ComparedBytes, PredictedStep

SCHEMA_VERSION = 1
JSON_NAME = "memory_report.json"
#: How the names of all metrics begin that loggers get.
METRIC_PREFIX = "memory/"
HTML_NAME = "memory_report.html"

# What draws a report knows it, and so is not known here: the package says who does.
_drawing: dict[str, Callable[[MemoryReport], str]] = {}

# Told apart from other JSON files by this entry, whatever their version.
_KIND = "lightning_memtrain memory report"


@dataclass(frozen=True)
class StepPeak:
    """The highest memory of one step, by the allocator or else by the ledger.

    Args:
        step: number of the step within its stage, from 0, counted over the whole run; in training an
            optimizer step, as loggers count them.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        peak_bytes: the device allocator's peak where it is known, else the ledger's.
        ledger: whether the ledger watched this step.
    """

    step: int
    stage: str
    peak_bytes: int
    ledger: bool


@dataclass(frozen=True)
class StepTimes:
    """How long the steps of a stage took, from the arrival of a batch until its end.

    Args:
        median_seconds: of steps that nobody measured; ``None`` if there was none.
        num_steps: how many these are; of a long run the latest.
        measured_median_seconds: of steps whose memory was measured, by the ledger for example; ``None``
            likewise.
        num_measured: how many these are.
        measured_seconds: all of them together.
    """

    median_seconds: float | None
    num_steps: int
    measured_median_seconds: float | None = None
    num_measured: int = 0
    measured_seconds: float = 0.0

    @property
    def added_seconds(self) -> float | None:
        """What measuring has added to the run: what measured steps took beyond the median of the others.

        ``None`` if that is not known. What a first step takes longer by itself is in it.
        """
        if self.median_seconds is None or not self.num_measured:
            return None
        return self.measured_seconds - self.num_measured * self.median_seconds

    def __str__(self) -> str:
        """A sentence for the terminal."""
        if self.median_seconds is None:
            seconds = self.measured_median_seconds or 0.0
            return f"{format_seconds(seconds)} per step, with measuring in all of them"
        text = f"{format_seconds(self.median_seconds)} per step (median of {self.num_steps:,})"
        if self.added_seconds is None:
            return text
        steps = "the measured step" if self.num_measured == 1 else f"the {self.num_measured:,} measured steps"
        more = "more" if self.added_seconds >= 0 else "less"
        return f"{text}; {steps} took {format_seconds(abs(self.added_seconds))} {more} than that in all"


@dataclass(frozen=True)
class LargestHolder:
    """One of the largest holders of memory, and what would help.

    Args:
        name: a category, or a module whose activations were held.
        num_bytes: its bytes.
        advice: techniques that make it smaller.
    """

    name: str
    num_bytes: int
    advice: str


@dataclass(frozen=True)
class OutOfMemory:
    """What was known when the device ran out of memory.

    Args:
        step: number of the step within its stage, from 0.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        message: the first line of the device's own error.
        held_bytes: peak of the failing step until the allocation failed.
        holders: the largest holders, largest first.
    """

    step: int
    stage: str
    message: str
    held_bytes: int
    holders: tuple[LargestHolder, ...]


@dataclass(frozen=True, repr=False)
class MemoryReport:
    """All that a run's profiler learned.

    Args:
        model: class name of the model.
        num_parameters: number of its parameters' elements.
        created: when the report was made, ISO 8601 in UTC.
        environment: versions and hardware, by name.
        stages: per stage (``"fit"``, ``"validate"``, ``"test"``, ``"predict"``) the profiled step with the
            highest peak.
        steps: the peak of every step, in order.
        growth: per stage, what outlived its step over the run, largest first.
        ranks: ``world_size``, ``max_peak_bytes`` and ``min_peak_bytes`` of a distributed run, else ``None``.
        out_of_memory: what was known when the device ran out of memory, ``None`` if it did not.
        techniques: what made the steps need less memory, with the settings in force at the end of the run.
        suggestions: what would have needed less, a line each, to be pasted into ``callbacks``.
        predicted: what was predicted of the training steps before they ran, ``None`` if nobody asked.
        step_times: per stage, how long its steps took.
    """

    model: str
    num_parameters: int
    created: str
    environment: Mapping[str, str]
    stages: Mapping[str, MemoryBreakdown]
    steps: tuple[StepPeak, ...] = ()
    growth: Mapping[str, tuple[Growth, ...]] = field(default_factory=dict)
    ranks: Mapping[str, int] | None = None
    out_of_memory: OutOfMemory | None = None
    techniques: tuple[TechniqueRecord, ...] = ()
    suggestions: tuple[str, ...] = ()
    predicted: PredictedStep | None = None
    step_times: Mapping[str, StepTimes] = field(default_factory=dict)

    def __repr__(self) -> str:
        peaks = ", ".join(f"{name} {format_bytes(one.peak_bytes)}" for name, one in self.stages.items())
        return f"<MemoryReport of {self.model}: {f'peak of {peaks}' if peaks else 'no step'}>"

    def __str__(self) -> str:
        """The table, as for the terminal."""
        return _drawing["table"](self)

    def _repr_html_(self) -> str:
        """The page, for notebooks."""
        return framed(_drawing["page"](self))

    def show(self) -> None:
        """Draw the page in a notebook, or print the table."""
        show(self, str(self))

    def save_html(self, path: str | Path) -> None:
        """Write the page.

        Args:
            path: the file; its folder is made if need be.
        """
        write_atomically(Path(path), _drawing["page"](self))

    @property
    def compared(self) -> tuple[ComparedBytes, ...]:
        """What was predicted of training steps beside what was counted; empty if one of both is missing."""
        if self.predicted is None or "fit" not in self.stages:
            return ()
        return self.predicted.beside(self.stages["fit"])

    @property
    def peak_stage(self) -> str | None:
        """The stage with the highest profiled peak, ``None`` if no step was profiled."""
        return max(self.stages, key=lambda stage: self.stages[stage].peak_bytes, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain names and numbers, for JSON."""
        return {
            "kind": _KIND,
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "num_parameters": self.num_parameters,
            "created": self.created,
            "environment": dict(self.environment),
            "stages": {stage: breakdown.to_dict() for stage, breakdown in self.stages.items()},
            "steps": [asdict(step) for step in self.steps],
            "growth": {stage: [row.to_dict() for row in rows] for stage, rows in self.growth.items()},
            "ranks": None if self.ranks is None else dict(self.ranks),
            "out_of_memory": None if self.out_of_memory is None else asdict(self.out_of_memory),
            "techniques": [record.to_dict() for record in self.techniques],
            "suggestions": list(self.suggestions),
            "predicted": None if self.predicted is None else self.predicted.to_dict(),
            "step_times": {stage: asdict(times) for stage, times in self.step_times.items()},
        }

    def to_json(self) -> str:
        """The text of the file that :meth:`save` writes."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryReport:
        """The report that :meth:`to_dict` made plain names and numbers of.

        Args:
            data: what :meth:`to_dict` returned, possibly after a trip through JSON.

        Returns:
            The report.

        Raises:
            ValueError: if ``data`` is no memory report, has another schema version, or lacks an entry.
        """
        if not isinstance(data, Mapping) or data.get("kind") != _KIND:
            raise ValueError(
                f"Expected a memory report (an object with kind={_KIND!r}), but got {_describe(data)}. "
                f"Pass the {JSON_NAME} that `MemoryProfiler` wrote."
            )
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            wrote = (data.get("environment") or {}).get("lightning_memtrain", "another version")
            raise ValueError(
                f"Expected a memory report with schema_version={SCHEMA_VERSION}, but got "
                f"schema_version={version!r}, written by lightning_memtrain {wrote}. "
                f"Read it with that version, or open the {HTML_NAME} beside it, which needs no version."
            )
        out_of_memory = None
        try:
            if data["out_of_memory"] is not None:
                holders = tuple(LargestHolder(**holder) for holder in data["out_of_memory"]["holders"])
                out_of_memory = OutOfMemory(**{**data["out_of_memory"], "holders": holders})
            return cls(
                model=data["model"],
                num_parameters=data["num_parameters"],
                created=data["created"],
                environment=dict(data["environment"]),
                stages={name: MemoryBreakdown.from_dict(stage) for name, stage in data["stages"].items()},
                steps=tuple(StepPeak(**step) for step in data["steps"]),
                growth={
                    stage: tuple(Growth.from_dict(row) for row in rows)
                    for stage, rows in data["growth"].items()
                },
                ranks=data["ranks"],
                out_of_memory=out_of_memory,
                # Older files have no such entry.
                techniques=tuple(TechniqueRecord.from_dict(row) for row in data.get("techniques", ())),
                suggestions=tuple(data.get("suggestions", ())),
                predicted=PredictedStep.from_dict(data["predicted"]) if data.get("predicted") else None,
                step_times={stage: StepTimes(**row) for stage, row in data.get("step_times", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"Expected a complete memory report, but an entry is missing or wrong: "
                f"{type(error).__name__}: {error}. The file was changed after it was written; "
                f"run the profiler again."
            ) from error

    def save(self, path: Path) -> None:
        """Write the report as JSON; an older file at ``path`` is replaced in one move or left as it was.

        Args:
            path: the file to write; its folder is made if need be.
        """
        write_atomically(path, self.to_json())

    def save_snapshot(self, path: Path, stage: str | None = None) -> None:
        """Write the timeline of a stage's highest step as torch writes snapshots of CUDA memory.

        So https://pytorch.org/memory_viz and ``python -m torch.cuda._memory_viz`` open it, from a step on CPU
        as well. What a category grows by at an event is one allocation in it, so single blocks are no single
        tensors; the bytes after each event are exact.

        Args:
            path: the file to write; its folder is made if need be.
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; ``None`` for that with the highest
                peak.

        Raises:
            ArgumentError: if the stage was not profiled.
            ValueError: if it was profiled without its timeline.
        """
        from lightning_memtrain.report.cuda_snapshot.writing import snapshot_of_breakdown, write_snapshot

        name = self.peak_stage if stage is None else stage
        if name is None or name not in self.stages:
            raise ArgumentError(
                f"`save_snapshot(stage)` must be a stage that was profiled, one of {list(self.stages)}, but "
                f"got {stage!r}."
            )
        if not self.stages[name].timeline:
            raise ValueError(
                f"`save_snapshot` writes the timeline of a step, but the stage {name!r} was profiled without "
                f"one. Use `MemoryProfiler(timeline=True)`."
            )
        write_snapshot(snapshot_of_breakdown(self.stages[name]), path)

    @classmethod
    def load(cls, path: Path) -> MemoryReport:
        """Read a report that :meth:`save` wrote.

        Args:
            path: the JSON file.

        Returns:
            The report.

        Raises:
            FileNotFoundError: if there is no file at ``path``.
            ValueError: if the file is cut off, is no memory report or has another schema version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected a memory report at {str(path)!r}, but there is no such file. "
                f"`MemoryProfiler` writes {JSON_NAME} into its `report_dir` at the end of a run: "
                f"pass that file."
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"Expected a memory report in {str(path)!r}, but it is not valid JSON ({error}): it was cut "
                f"off or is another kind of file. Pass the {JSON_NAME} that `MemoryProfiler` wrote, or run "
                f"it again."
            ) from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{error} (File: {str(path)!r}.)") from error


def _describe(data: Any) -> str:
    if isinstance(data, Mapping):
        return f"an object with the entries {sorted(map(str, data))[:5]}"
    return f"{type(data).__name__} data"


def draw_with(**drawing: Callable[[MemoryReport], str]) -> None:
    """Say who draws reports.

    Args:
        **drawing: ``table`` and ``page``.
    """
    _drawing.update(drawing)
