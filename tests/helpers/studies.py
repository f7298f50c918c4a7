"""Results of studies made without training."""

from __future__ import annotations

from lightning_memtrain.study.grid import Grid, read_grid
from lightning_memtrain.study.run_record import RunRecord
from lightning_memtrain.study.study_result import StudyResult, StudyRun, summarize

GRID = {
    "score": {"metric": "test/accuracy", "percent": True},
    "variants": {"plain": {}, "half": {"technique": "precision", "strength": "bf16"}},
    "combinations": {"both": ["plain", "half"]},
}


def record(state: str = "finished", **fields: object) -> RunRecord:
    """A record with what every one has."""
    return RunRecord("net", state, "2026-01-02T03:04:05+00:00", **fields)  # type: ignore[arg-type]


def finished_run(
    variant: str, seed: int, score: float, ledger: int, allocator: int, step: float = 0.25
) -> StudyRun:
    """A run that is over."""
    at_peak = {"activations": ledger, "workspace": allocator - ledger}
    return StudyRun(
        name=f"{variant}-seed{seed}",
        variant=variant,
        seed=seed,
        state="finished",
        score=score,
        curve=((5, 0.25), (10, score)),
        settings={"seed_everything": seed},
        command="memtrain run net",
        record=record(
            seed=seed,
            seconds=60.0,
            step_seconds=step,
            num_timed_steps=7,
            ledger_peak_bytes=ledger,
            allocator_peak_bytes=allocator,
            at_peak={name: size for name, size in at_peak.items() if size},
            metrics={"test/accuracy": score},
            environment={"processor": "A processor", "num_threads": "1"},
        ),
    )


def small_result(grid: Grid | None = None) -> StudyResult:
    """Two variants and a combination; one run is finished, one failed, one cut and one waits."""
    read = read_grid(GRID) if grid is None else grid
    runs = (
        finished_run("plain", 1, 0.5, 360, 400),
        finished_run("half", 1, 0.5, 90, 100, step=0.5),
        StudyRun("both-seed1", "both", 1, "failed", "ValueError: <no> such & thing"),
        finished_run("plain", 2, 0.75, 360, 400),
        StudyRun("plain-seed3", "plain", 3, "cut"),
    )
    return StudyResult(
        recipe="net",
        baseline="plain",
        score=read.score,
        created="2026-01-02T03:04:05+00:00",
        lightning_memtrain="0.1.0",
        commit=None,
        num_jobs=2,
        variants=summarize(read, runs),
        runs=runs,
    )
