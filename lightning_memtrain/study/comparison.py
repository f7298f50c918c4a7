"""Runs side by side: what of their peaks differs, and what else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_memtrain.core import ArgumentError, MemoryBreakdown
from lightning_memtrain.report.memory_report import JSON_NAME, MemoryReport
from lightning_memtrain.study.run_record import RunRecord

SCHEMA_VERSION = 1
_KIND = "lightning_memtrain comparison"
_NUM_MODULES = 12


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs.

    Args:
        name: short, and unlike the others'.
        path: as it was given.
        recipe: name of the recipe; ``None`` if the run does not say.
        model: class name of the model.
        peak_bytes: by the allocator where it is known, else by the ledger.
        ledger_peak_bytes: by the ledger.
        allocator_peak_bytes: by the allocator; ``None`` if it is not known.
        at_peak: bytes by category, which add up to the peak.
        step_seconds: median time of a step; ``None`` if it is not known.
        num_timed_steps: how many steps that is the median of.
        metrics: last values of what validation and test have logged.
        techniques: each with its settings, as text.
    """

    name: str
    path: str
    recipe: str | None
    model: str
    peak_bytes: int
    ledger_peak_bytes: int
    allocator_peak_bytes: int | None
    at_peak: Mapping[str, int]
    step_seconds: float | None = None
    num_timed_steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    techniques: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChangedModule:
    """A module that does not hold the same in all runs.

    Args:
        name: path in the model; ``""`` is the model itself.
        type_name: its class.
        total_bytes: at the peak of each run; ``None`` where there is no such module.
    """

    name: str
    type_name: str
    total_bytes: tuple[int | None, ...]

    @property
    def range_bytes(self) -> int:
        """By how much the runs differ."""
        sizes = [size or 0 for size in self.total_bytes]
        return max(sizes) - min(sizes)


@dataclass(frozen=True)
class Comparison:
    """At least two runs.

    Args:
        stage: whose peaks these are.
        runs: in the order in which they were named.
        modules: those that differ most, first the one that does by most bytes.
        notes: what has to be known to read it, a sentence each.
    """

    stage: str
    runs: tuple[ComparedRun, ...]
    modules: tuple[ChangedModule, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON."""
        return {"kind": _KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}


@dataclass(frozen=True)
class LoadedRun:
    """What is in a run's folder.

    Args:
        path: as it was given.
        report: of its memory.
        record: ``None`` if the run has none.
    """

    path: Path
    report: MemoryReport
    record: RunRecord | None


def load_run(path: Path | str) -> LoadedRun:
    """Read what a run has left.

    Args:
        path: its folder, the folder in it that has the report, or the report itself.

    Returns:
        The report, and the record if there is one.

    Raises:
        ArgumentError: if there is no report.
        ValueError: if it is of another version.
    """
    if not isinstance(path, (str, Path)):
        raise ArgumentError(
            f"`load_run(path)` must be the folder of a run, but got {path!r}. Name the folder of a run that "
            "had a `MemoryProfiler`."
        )
    path = Path(path)
    places = [path / "memory" / JSON_NAME, path / JSON_NAME, path]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        what = "is no run's folder: it has no memory report" if path.is_dir() else "does not exist"
        raise ArgumentError(
            f"`load_run(path)` must be the folder of a run, but got `{path}`, which {what}. Name the folder "
            f"of a run that had a `MemoryProfiler`, or its `{JSON_NAME}`."
        )
    # The latest report lies in `memory`, and each run's own in a folder in it.
    above = [file.parent, file.parent.parent]
    folder = next((one.parent for one in above if one.name == "memory"), file.parent)
    return LoadedRun(path, MemoryReport.load(file), RunRecord.load(folder))


def compare_runs(loaded: Sequence[LoadedRun], stage: str = "fit") -> Comparison:
    """Lay runs side by side.

    Args:
        loaded: at least two.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

    Returns:
        The comparison.

    Raises:
        ArgumentError: if there are fewer than two, or one has no such stage.
    """
    if not isinstance(loaded, Sequence) or not all(isinstance(run, LoadedRun) for run in loaded):
        raise ArgumentError(
            f"`compare_runs(loaded)` must be runs that `load_run` has read, but got {loaded!r}. Write "
            'compare_runs([load_run("first"), load_run("second")]).'
        )
    if len(loaded) < 2:
        raise ArgumentError(
            f"`compare_runs(loaded)` must be at least two runs, but got {len(loaded)}. Name another one."
        )
    for run in loaded:
        if stage not in run.report.stages:
            known = ", ".join(f"`{name}`" for name in run.report.stages) or "none"
            raise ArgumentError(
                f"`compare_runs(stage)` must be a stage that every run has profiled, but got {stage!r}, and "
                f"`{run.path}` has {known}. Name one that all have."
            )
    names = short_names([run.path for run in loaded])
    breakdowns = [run.report.stages[stage] for run in loaded]
    runs = tuple(
        _compared(name, run, breakdown, stage)
        for name, run, breakdown in zip(names, loaded, breakdowns, strict=True)
    )
    return Comparison(stage, runs, changed_modules(breakdowns), _notes(runs, loaded))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Name each run by the end of its path, with as many folders as make the names differ.

    Args:
        paths: folders of runs, or their reports.

    Returns:
        A name for each, in the same order.

    Example:
        >>> short_names([Path("runs/a/memory/memory_report.json"), Path("old/a"), Path("runs/b")])
        ['runs/a', 'old/a', 'b']
    """
    folders = [
        path.parent.parent if path.name == JSON_NAME and path.parent.name == "memory" else path
        for path in (Path(path) for path in paths)
    ]
    lengths = [1] * len(folders)
    while True:
        names = [
            "/".join(folder.parts[-length:]) if length < len(folder.parts) else str(folder)
            for folder, length in zip(folders, lengths, strict=True)
        ]
        longer = [
            index
            for index, name in enumerate(names)
            if names.count(name) > 1 and lengths[index] < len(folders[index].parts)
        ]
        if not longer:
            break
        for index in longer:
            lengths[index] += 1
    return [f"{name} ({index + 1})" if names.count(name) > 1 else name for index, name in enumerate(names)]


def changed_modules(breakdowns: Sequence[MemoryBreakdown]) -> tuple[ChangedModule, ...]:
    """The modules whose bytes at the peak differ most between runs, matched by name.

    Args:
        breakdowns: of the runs.

    Returns:
        At most a dozen, first those that differ most.
    """
    rows = [{module.name: module for module in breakdown.modules} for breakdown in breakdowns]
    changed = []
    for name in dict.fromkeys(name for modules in rows for name in modules):
        found = [modules.get(name) for modules in rows]
        kind = next(module.type_name for module in found if module is not None)
        totals = tuple(None if module is None else module.total_bytes for module in found)
        changed.append(ChangedModule(name, kind, totals))
    changed = [module for module in changed if module.range_bytes]
    return tuple(sorted(changed, key=lambda module: -module.range_bytes)[:_NUM_MODULES])


def _compared(name: str, run: LoadedRun, breakdown: MemoryBreakdown, stage: str) -> ComparedRun:
    record = run.record
    metrics = {} if record is None else dict(record.metrics)
    # A run that is no recipe's has its times in the report alone.
    times = run.report.step_times.get(stage)
    seconds = None if times is None else times.median_seconds
    num_timed = 0 if times is None else times.num_steps
    if record is not None and stage == "fit":
        seconds, num_timed = record.step_seconds, record.num_timed_steps
    return ComparedRun(
        name=name,
        path=str(run.path),
        recipe=(record.recipe or None) if record is not None else None,
        model=run.report.model,
        peak_bytes=breakdown.peak_bytes,
        ledger_peak_bytes=breakdown.ledger_peak_bytes,
        allocator_peak_bytes=breakdown.allocator_peak_bytes,
        at_peak={key: size for key, size in breakdown.at_peak.to_dict().items() if size},
        step_seconds=seconds,
        num_timed_steps=num_timed,
        metrics={key: value for key, value in metrics.items() if key.startswith(("val/", "test/"))},
        techniques=tuple(str(technique) for technique in run.report.techniques),
    )


def _notes(runs: Sequence[ComparedRun], loaded: Sequence[LoadedRun]) -> tuple[str, ...]:
    notes = []

    def told(values: Sequence[object]) -> str:
        return ", ".join(f"{run.name}: {value}" for run, value in zip(runs, values, strict=True))

    recipes = [run.recipe for run in runs]
    if len(set(recipes) - {None}) > 1:
        notes.append(f"These are runs of different recipes ({told(recipes)}); modules are matched by name.")
    elif len({run.model for run in runs}) > 1:
        notes.append(f"The models differ ({told([run.model for run in runs])}); modules are matched by name.")
    for run, one in zip(runs, loaded, strict=True):
        if one.record is None:
            notes.append(
                f"{run.name} has no `run.json`: it was not made by `memtrain run`, or by an older version; "
                "its score is not known."
            )
        elif one.record.state != "finished":
            notes.append(f"{run.name} is not finished ({one.record.state}).")
    known = {run.allocator_peak_bytes is not None for run in runs}
    if len(known) > 1:
        notes.append("The peak of some runs is by the allocator, of others by the ledger alone.")
    for key, what in (
        ("device", "devices"),
        ("processor", "processors"),
        ("num_threads", "numbers of threads"),
    ):
        values = [_environment(one).get(key) for one in loaded]
        if len(set(values) - {None}) > 1:
            notes.append(f"The runs had different {what} ({told(values)}), so step times are not comparable.")
    versions = [_environment(one).get("lightning_memtrain") for one in loaded]
    if len(set(versions) - {None}) > 1:
        notes.append(f"The runs are by different versions of lightning_memtrain ({told(versions)}).")
    return tuple(notes)


def _environment(run: LoadedRun) -> Mapping[str, str]:
    return {**run.report.environment, **(run.record.environment if run.record is not None else {})}
