"""A finished report goes into its folder, to the loggers and to the terminal."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_memtrain.core import ReportWarning
from lightning_memtrain.report.memory_report import HTML_NAME, JSON_NAME, MemoryReport
from lightning_memtrain.report.outputs.html import save_html
from lightning_memtrain.report.outputs.loggers import log_report
from lightning_memtrain.report.outputs.report_table import print_table
from lightning_memtrain.report.row_limit import limit_rows
from lightning_memtrain.report.trainer_state import stage_name


def publish_report(report: MemoryReport, trainer: Trainer, folder: Path, max_rows: int | None) -> None:
    """Write, log and print a report, on the rank that has to.

    Args:
        report: the finished report.
        trainer: the trainer whose run it is about.
        folder: where its files go.
        max_rows: rows of a kind that a stage has in the file; ``None`` for all.
    """
    if not trainer.is_global_zero:
        # Only the rank that ran out of memory knows why; its report must not meet that of rank 0.
        if report.out_of_memory is None:
            return
        folder /= f"rank_{trainer.global_rank}"
    written = _write(report, folder, max_rows)
    for logger in trainer.loggers:
        log_report(logger, report, folder if written else None)
    if not trainer.barebones:
        print_table(_only_stage(report, stage_name(trainer)))


def _write(report: MemoryReport, folder: Path, max_rows: int | None) -> bool:
    """Write both files; whether that was possible."""
    try:
        short = report if max_rows is None else limit_rows(report, max_rows)
        short.save(folder / JSON_NAME)
        save_html(report, folder / HTML_NAME)
    except OSError as error:
        warnings.warn(
            f"`MemoryProfiler(report_dir)` must be a folder that can be written to, "
            f"but {str(folder)!r} cannot: {type(error).__name__}: {error}. "
            f"The report is printed, logged and kept as `MemoryProfiler.report`; "
            f"write it with `profiler.report.save(path)`, and give another `report_dir` next time.",
            ReportWarning,
            stacklevel=2,
        )
        return False
    return True


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
