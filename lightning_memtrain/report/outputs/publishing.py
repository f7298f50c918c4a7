"""A finished report goes into its folder, to the loggers and to the terminal."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_memtrain.core import ReportWarning
from lightning_memtrain.report.memory_report import HTML_NAME, JSON_NAME, MemoryReport
from lightning_memtrain.report.outputs.html import save_html
from lightning_memtrain.report.outputs.loggers import log_report
from lightning_memtrain.report.outputs.report_table import print_table
from lightning_memtrain.report.row_limit import limit_rows
from lightning_memtrain.report.trainer_state import stage_name


class ReportFiles:
    """The files of a run's report: in a folder of the run's own, and as the latest in the one around it.

    So a script finds the latest at the same place, and what a run has printed stays what it was.

    Args:
        folder: where reports go.
        max_rows: rows of a kind that a stage has in the JSON file; ``None`` for all.
    """

    def __init__(self, folder: Path, max_rows: int | None) -> None:
        self.folder = folder
        self._max_rows = max_rows
        self._own: Path | None = None

    def write(self, report: MemoryReport, subfolder: str = "") -> Path | None:
        """Write the report; again, if the run has gone on.

        Args:
            report: of the run, so far.
            subfolder: in the folder, for a rank that has a report of its own.

        Returns:
            The page; ``None`` if nothing could be written, of which a warning tells.
        """
        folder = self.folder / subfolder
        try:
            if self._own is None:
                self._own = _make_folder(folder, report.created)
            short = report if self._max_rows is None else limit_rows(report, self._max_rows)
            short.save(self._own / JSON_NAME)
            save_html(report, self._own / HTML_NAME)
            for name in (JSON_NAME, HTML_NAME):
                _put_beside(self._own / name, folder / name)
        except OSError as error:
            warnings.warn(
                f"`MemoryProfiler(report_dir)` must be a folder that can be written to, "
                f"but {str(folder)!r} cannot: {type(error).__name__}: {error}. "
                f"The report is printed, logged and kept as `MemoryProfiler.report`; "
                f"write it with `profiler.report.save(path)`, and give another `report_dir` next time.",
                ReportWarning,
                stacklevel=2,
            )
            return None
        return self._own / HTML_NAME


def publish_report(report: MemoryReport, trainer: Trainer, files: ReportFiles, *, log_all: bool) -> None:
    """Write, log and print a report, on the rank that has to.

    Args:
        report: the finished report.
        trainer: the trainer whose run it is about.
        files: where it is written.
        log_all: whether loggers get all metrics.
    """
    if trainer.is_global_zero:
        page = files.write(report)
    elif report.out_of_memory is not None:
        # Only the rank that ran out of memory knows why; its report must not meet that of rank 0.
        page = files.write(report, f"rank_{trainer.global_rank}")
    else:
        return
    for logger in trainer.loggers:
        log_report(logger, report, None if page is None else page.parent, log_all=log_all)
    if not trainer.barebones:
        print_table(_only_stage(report, stage_name(trainer)))
        if page is not None:
            print(f"Page: {page}")  # in one piece, so that terminals make a link of it


def _make_folder(folder: Path, created: str) -> Path:
    """A new folder in another one, named after the run's time."""
    name = f"{datetime.fromisoformat(created).astimezone():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        own = folder / (name if number == 1 else f"{name}-{number}")
        try:
            own.mkdir(parents=True)
        except FileExistsError:
            if not own.is_dir():
                raise
            number += 1
        else:
            return own


def _put_beside(source: Path, target: Path) -> None:
    """Have a file at a second place, in one move: the same one where the file system can, else a copy."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _only_stage(report: MemoryReport, name: str) -> MemoryReport:
    """For the terminal: a test after a fit does not show the fit again."""
    if name == "fit":
        return report
    return replace(
        report,
        stages={stage: breakdown for stage, breakdown in report.stages.items() if stage == name},
        steps=tuple(step for step in report.steps if step.stage == name),
        growth={stage: rows for stage, rows in report.growth.items() if stage == name},
    )
