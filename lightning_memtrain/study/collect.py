"""Gathers what the runs of a study have left in its folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from lightning_memtrain.__about__ import __version__
from lightning_memtrain.study.grid import Grid, Score, nearest
from lightning_memtrain.study.run_record import RunRecord
from lightning_memtrain.study.study_folder import StudyFolder, read_curve
from lightning_memtrain.study.study_plan import PlannedRun, StudyPlan
from lightning_memtrain.study.study_result import StudyResult, StudyRun, summarize


def collect(
    folder: StudyFolder, plan: StudyPlan, grid: Grid, *, num_jobs: int, commit: str | None = None
) -> StudyResult:
    """Read the state of every run from disk.

    Args:
        folder: of the study.
        plan: all its runs.
        grid: what it was made from.
        num_jobs: runs at a time.
        commit: of the checkout that runs it.

    Returns:
        What there is so far.
    """
    runs = tuple(_read_run(folder, plan.recipe, run, grid.score) for run in plan.runs)
    return StudyResult(
        recipe=plan.recipe,
        baseline=grid.baseline,
        score=grid.score,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        lightning_memtrain=__version__,
        commit=commit,
        num_jobs=num_jobs,
        variants=summarize(grid, runs),
        runs=runs,
    )


def failure_file(folder: StudyFolder, name: str) -> Path:
    """Where it is kept why a run has failed, also one that failed before it could say so itself."""
    return folder.log(name).with_suffix(".failed")


def _read_run(folder: StudyFolder, recipe: str, run: PlannedRun, score: Score | None) -> StudyRun:
    record, state, reason = None, "waiting", ""
    try:
        record = folder.record(run.name)
    except ValueError as error:
        state, reason = "failed", str(error)
    failed = failure_file(folder, run.name)
    if record is not None and record.state == "finished":
        state = "finished"
    elif failed.is_file():
        state, reason = "failed", failed.read_text(encoding="utf-8").strip()
    elif state != "failed" and folder.run(run.name).is_dir():
        state = "cut"
    value, missing = _score_of(record, score) if state == "finished" else (None, "")
    path = folder.run(run.name)
    config = folder.config(run.name).relative_to(folder.path)
    options = ["--run-dir", str(path.relative_to(folder.path)), "--config", str(config)]
    test = ["--test"] if needs_test(score) else []
    return StudyRun(
        name=run.name,
        variant=run.variant,
        seed=run.seed,
        state=state,
        reason=reason or missing,
        score=value,
        curve=tuple(read_curve(path / "metrics.csv", curve_metric(score))) if score is not None else (),
        settings=run.config,
        command=shlex.join(["memtrain", "run", recipe, *options, *test]),
        record=record,
    )


def needs_test(score: Score | None) -> bool:
    """Whether runs are tested after training."""
    return score is not None and score.metric.startswith("test/")


def curve_metric(score: Score) -> str:
    """What is drawn over the steps: of a test's score, its counterpart in validation."""
    return f"val/{score.metric.removeprefix('test/')}" if needs_test(score) else score.metric


def _score_of(record: RunRecord | None, score: Score | None) -> tuple[float | None, str]:
    if score is None or record is None:
        return None, ""
    if score.metric in record.metrics:
        return record.metrics[score.metric], ""
    known: Sequence[str] = list(record.metrics)
    logged = f"the run logged no finite `{score.metric}`, only {', '.join(known) or 'nothing'}."
    return None, logged + nearest(score.metric, known)
