"""Where a study keeps what."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from lightning_memtrain.study.run_record import RunRecord


@dataclass(frozen=True)
class StudyFolder:
    """Paths in the folder of a study.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def plan(self) -> Path:
        """All runs with their configurations."""
        return self.path / "plan.json"

    @property
    def results(self) -> Path:
        """What came of all runs."""
        return self.path / "study.json"

    @property
    def page(self) -> Path:
        """The same, to be looked at."""
        return self.path / "study.html"

    @property
    def figures(self) -> Path:
        """The page's figures as files."""
        return self.path / "figures"

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.path / "runs" / name

    def config(self, name: str) -> Path:
        """What a run lays over the recipe."""
        return self.path / "configs" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        """All that a run's processes print."""
        return self.path / "logs" / f"{name}.log"

    def lock(self, name: str) -> Path:
        """Held for as long as a process works on the run."""
        return self.path / "locks" / f"{name}.lock"

    def record(self, name: str) -> RunRecord | None:
        """How far a run is; ``None`` if it has not begun to train."""
        return RunRecord.load(self.run(name))

    def has_checkpoint(self, name: str) -> bool:
        """Whether a run can be resumed."""
        run = self.run(name)
        return (run / "config.yaml").is_file() and any((run / "checkpoints").glob("*.ckpt"))


def read_curve(metrics: Path, metric: str) -> list[tuple[int, float]]:
    """Read what a run has logged of one metric.

    Args:
        metrics: its ``metrics.csv``.
        metric: name of the metric.

    Returns:
        Steps and values, in order; none if the metric was not logged.
    """
    if not metrics.is_file():
        return []
    with metrics.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    curve: list[tuple[int, float]] = []
    for row in rows:
        step, value = row.get("step"), row.get(metric)
        if step and value and step.isdecimal():
            curve.append((int(step), float(value)))
    return curve
