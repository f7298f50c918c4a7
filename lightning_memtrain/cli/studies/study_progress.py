"""Shows how far a study is: bars in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from lightning_memtrain.cli.studies.study_setup import say
from lightning_memtrain.core import format_bytes
from lightning_memtrain.core.units import format_seconds
from lightning_memtrain.study.grid import Grid
from lightning_memtrain.study.printed_numbers import short_score, times
from lightning_memtrain.study.running.study_runner import Standing
from lightning_memtrain.study.study_folder import StudyFolder
from lightning_memtrain.study.study_plan import PlannedRun
from lightning_memtrain.study.study_result import StudyResult


class StudyProgress:
    """A context manager that shows the standing of a study as long as it is entered.

    Args:
        folder: of the study.
        grid: what it runs.
        after_run: is called after each run.
    """

    def __init__(self, folder: StudyFolder, grid: Grid, after_run: Callable[[], object]) -> None:
        self._folder = folder
        self._grid = grid
        self._after_run = after_run
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._all: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._standing = Standing(0, 0, 0)

    def __enter__(self) -> StudyProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, standing: Standing) -> None:
        """Draw the bars anew."""
        self._standing = standing
        done = standing.num_finished + standing.num_failed
        if self._all is None:
            self._all = self._progress.add_task("all runs", text="")
        text = f"{done} of {standing.num_runs}"
        if standing.num_failed:
            text += f", {standing.num_failed} failed"
        self._progress.update(
            self._all, completed=done, total=standing.num_runs, text=f"{text}, {self._left()}"
        )
        for name, record in standing.running.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(f"  {name}", text="", total=None)
            if record is None:
                self._progress.update(self._tasks[name], text="starting")
                continue
            steps = f"step {record.num_steps} of {record.total_steps or '?'}"
            self._progress.update(
                self._tasks[name], completed=record.num_steps, total=record.total_steps, text=steps
            )
        for name in set(self._tasks) - set(standing.running):
            self._progress.remove_task(self._tasks.pop(name))

    def tell_end(self, run: PlannedRun, reason: str) -> None:
        """A line for each run that has ended."""
        self._after_run()
        if reason:
            self._console.print(f"{run.name}: failed: {reason}", style="red", markup=False, highlight=False)
            return
        record = self._folder.record(run.name)
        assert record is not None
        parts = []
        score = self._grid.score
        if score is not None and score.metric in record.metrics:
            parts.append(f"{score.metric} {short_score(score, record.metrics[score.metric])}")
        if record.peak_bytes is not None:
            parts.append(format_bytes(record.peak_bytes))
        parts.append(format_seconds(record.seconds))
        left = "" if self._console.is_terminal else f"; {self._left()}"
        self._console.print(f"{run.name}: {', '.join(parts)}{left}", markup=False, highlight=False)

    def tell_stopping(self) -> None:
        """After a signal to end."""
        say("stopping: each run ends its step and saves a checkpoint; a second signal stops at once")

    def print_result(self, result: StudyResult) -> None:
        """A table of all variants, and where the page is."""
        table = Table(title=f"Study of {result.recipe}", title_justify="left", title_style="bold")
        table.add_column("variant", overflow="fold")
        for name in ("runs", "peak", "less", "step", "slower", *(["score"] if result.score else [])):
            table.add_column(name, justify="right")
        for row in result.variants:
            cells = [
                f"{row.num_finished}/{row.num_runs}",
                "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
                times(row.times_less),
                "" if row.step_seconds is None else format_seconds(row.step_seconds),
                times(row.times_slower),
            ]
            if result.score is not None:
                spread = None if row.score is None else row.score_spread
                cells.append("" if row.score is None else short_score(result.score, row.score, spread))
            table.add_row(row.name + (" *" if row.on_front else ""), *cells)
        self._console.print(table)
        if any(row.on_front for row in result.variants):
            self._console.print(
                "* no other variant is at least as good in score and memory, and better in one"
            )
        for run in result.runs:
            if run.reason:
                self._console.print(f"{run.name}: {run.reason}", markup=False, highlight=False)
        self._console.print(f"Results: {self._folder.results}", soft_wrap=True, highlight=False)
        self._console.print(f"Page: {self._folder.page}", soft_wrap=True, highlight=False)

    def _left(self) -> str:
        standing = self._standing
        if standing.seconds_left is None:
            return "time left not known yet"
        return f"about {format_seconds(standing.seconds_left)} left" if standing.seconds_left else "none left"
