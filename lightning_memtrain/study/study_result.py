"""What came of a study: ``study.json``, and the mean of each variant's seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from lightning_memtrain.study.grid import Grid, Score, Variant
from lightning_memtrain.study.pareto_front import pareto_front
from lightning_memtrain.study.run_record import RunRecord

SCHEMA_VERSION = 1
_KIND = "lightning_memtrain study"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Args:
        name: of the run, and of its folder in ``runs/``.
        variant: of which variant.
        seed: of its random numbers.
        state: ``"waiting"``, ``"cut"`` (begun, and not at its end), ``"failed"`` or ``"finished"``.
        reason: why it failed, or why it has no score; else ``""``.
        score: as it was logged; ``None`` if there is none.
        curve: steps and values of what was logged on the way.
        settings: what is laid over the recipe's configuration.
        command: which does the same run again, from the study's folder.
        record: all else; ``None`` before it begins to train.
    """

    name: str
    variant: str
    seed: int
    state: str = "waiting"
    reason: str = ""
    score: float | None = None
    curve: Sequence[tuple[int, float]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    record: RunRecord | None = None


@dataclass(frozen=True)
class VariantResult:
    """The finished runs of a variant together.

    Args:
        name: of the variant.
        technique: of which technique it is a strength.
        strength: how strong.
        members: of what it is a combination.
        num_runs: how many runs are asked for.
        num_finished: how many of them are finished; the figures are of these.
        scores: of each, in order of the runs.
        score: mean of the scores.
        score_spread: their standard deviation (of a sample: n - 1); ``None`` of fewer than two.
        peak_bytes: of the run with the highest peak, by the allocator where it is known, else by the ledger.
        ledger_peak_bytes: of the same run.
        allocator_peak_bytes: of the same run.
        at_peak: of the same run, by category.
        step_seconds: median of the runs' medians.
        times_less: the baseline's peak over this one.
        times_slower: this step's time over the baseline's.
        score_change: this score minus the baseline's.
        on_front: whether no other variant is at least as good in score and memory and better in one.
    """

    name: str
    technique: str = ""
    strength: int | float | str | None = None
    members: tuple[str, ...] = ()
    num_runs: int = 0
    num_finished: int = 0
    scores: tuple[float, ...] = ()
    score: float | None = None
    score_spread: float | None = None
    peak_bytes: int | None = None
    ledger_peak_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    at_peak: Mapping[str, int] = field(default_factory=dict)
    step_seconds: float | None = None
    times_less: float | None = None
    times_slower: float | None = None
    score_change: float | None = None
    on_front: bool = False


@dataclass(frozen=True)
class StudyResult:
    """All that a study has found.

    Args:
        recipe: name of the recipe.
        baseline: name of the variant that the others are compared with.
        score: by what runs are compared.
        created: when this was put together, ISO 8601 in UTC.
        lightning_memtrain: version that put it together.
        commit: of the checkout that ran it; ``None`` if it was installed.
        num_jobs: runs at a time, of the latest call.
        variants: results by variant, in the order of the grid.
        runs: every run.
    """

    recipe: str
    baseline: str
    score: Score | None
    created: str
    lightning_memtrain: str
    commit: str | None
    num_jobs: int
    variants: tuple[VariantResult, ...]
    runs: tuple[StudyRun, ...]

    def to_json(self) -> str:
        """The text of ``study.json``."""
        data = {"kind": _KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path | str) -> StudyResult:
        """Read what :meth:`to_json` made.

        Args:
            path: of the file.

        Returns:
            The result.

        Raises:
            ValueError: if it is none, or of another version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            kind, version = data.pop("kind", None), data.pop("schema_version", None)
            if (kind, version) != (_KIND, SCHEMA_VERSION):
                raise ValueError(
                    f"expected kind={_KIND!r} and schema_version={SCHEMA_VERSION}, but got {kind!r} and "
                    f"{version!r}"
                )
            data["score"] = None if data["score"] is None else Score(**data["score"])
            data["variants"] = tuple(
                VariantResult(**{**row, "scores": tuple(row["scores"]), "members": tuple(row["members"])})
                for row in data["variants"]
            )
            data["runs"] = tuple(
                StudyRun(
                    **{
                        **row,
                        "curve": tuple((step, value) for step, value in row["curve"]),
                        "record": None if row["record"] is None else _record(row["record"]),
                    }
                )
                for row in data["runs"]
            )
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{path}` is no result of a study: {error}.") from error


def _record(row: Mapping[str, Any]) -> RunRecord:
    return RunRecord(**{**row, "techniques": tuple(row["techniques"])})


def summarize(grid: Grid, runs: Sequence[StudyRun]) -> tuple[VariantResult, ...]:
    """Put the finished runs of each variant together and compare them with the baseline.

    Args:
        grid: what the study runs.
        runs: every run.

    Returns:
        One result per variant, in the grid's order.
    """
    alone = {variant.name: _together(variant, runs) for variant in grid.variants}
    baseline = alone[grid.baseline]
    front = _front(grid.score, alone.values())
    return tuple(_compared(result, baseline, result.name in front) for result in alone.values())


def _together(variant: Variant, runs: Sequence[StudyRun]) -> VariantResult:
    mine = [run for run in runs if run.variant == variant.name]
    finished = [run for run in mine if run.state == "finished"]
    records = [run.record for run in finished if run.record is not None]
    scores = tuple(run.score for run in finished if run.score is not None)
    measured = [record for record in records if record.peak_bytes is not None]
    highest = max(measured, key=lambda record: record.peak_bytes or 0, default=None)
    times = [record.step_seconds for record in records if record.step_seconds is not None]
    return VariantResult(
        name=variant.name,
        technique=variant.technique,
        strength=variant.strength,
        members=variant.members,
        num_runs=len(mine),
        num_finished=len(finished),
        scores=scores,
        score=fmean(scores) if scores else None,
        score_spread=stdev(scores) if len(scores) > 1 else None,
        peak_bytes=None if highest is None else highest.peak_bytes,
        ledger_peak_bytes=None if highest is None else highest.ledger_peak_bytes,
        allocator_peak_bytes=None if highest is None else highest.allocator_peak_bytes,
        at_peak={} if highest is None else dict(highest.at_peak),
        step_seconds=median(times) if times else None,
    )


def _compared(result: VariantResult, baseline: VariantResult, on_front: bool) -> VariantResult:
    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    known = result.score is not None and baseline.score is not None
    return VariantResult(
        **{
            **vars(result),
            "times_less": ratio(baseline.peak_bytes, result.peak_bytes),
            "times_slower": ratio(result.step_seconds, baseline.step_seconds),
            "score_change": (result.score or 0) - (baseline.score or 0) if known else None,
            "on_front": on_front,
        }
    )


def _front(score: Score | None, results: Sequence[VariantResult] | Any) -> list[str]:
    if score is None:
        return []
    sign = -1 if score.mode == "max" else 1
    costs = {
        result.name: (result.peak_bytes, sign * result.score)
        for result in results
        if result.peak_bytes is not None and result.score is not None and math.isfinite(result.score)
    }
    return pareto_front(costs)
