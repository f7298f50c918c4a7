"""What each of Lightning's loggers is given, beyond scalars; a logger that fails never ends the training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities import rank_zero_only

from lightning_memtrain.compat.lightning_private import batches_that_stepped
from lightning_memtrain.core import MIB, Category, ReportWarning, TechniqueRecord, format_bytes
from lightning_memtrain.report.memory_report import HTML_NAME, JSON_NAME, MemoryReport
from lightning_memtrain.report.outputs.html import render_html
from lightning_memtrain.report.outputs.module_columns import MODULE_COLUMNS, module_row
from lightning_memtrain.report.outputs.wandb_panels import define_axis, describe, log_to_wandb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger

_NUM_TEXT_MODULES = 20


@rank_zero_only
def define_metrics(logger: Logger, *, log_all: bool = False) -> None:
    """Give the timeline's series their own axis, where the logger knows axes (W&B).

    Call it before anything is logged.

    Args:
        logger: any Lightning logger.
        log_all: whether there will be such series.
    """
    with training_goes_on(logger):
        if log_all and logger_kind(logger) == "WandbLogger":
            define_axis(logger)


@rank_zero_only
def describe_techniques(trainer: Trainer, techniques: Sequence[TechniqueRecord]) -> None:
    """Put techniques and their settings into the configuration of W&B runs, which are grouped by it.

    Args:
        trainer: the running trainer.
        techniques: of its run.
    """
    for logger in trainer.loggers:
        with training_goes_on(logger):
            if logger_kind(logger) == "WandbLogger":
                describe(logger, techniques)


def log_scalars(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Send metrics to every logger, at the step that Lightning's own monitors use.

    Args:
        trainer: the running trainer.
        metrics: values by key.
    """
    step = batches_that_stepped(trainer)
    for logger in trainer.loggers:
        with training_goes_on(logger):
            logger.log_metrics(dict(metrics), step=step)


@rank_zero_only
def log_report(
    logger: Logger, report: MemoryReport, report_dir: Path | None, *, log_all: bool = False
) -> None:
    """Send a finished report in the richest form that the logger knows.

    W&B gets tables, charts, the page, the timeline, the summary and the JSON as an artifact; TensorBoard
    tables as text; MLflow both files. Other loggers have the scalars and get nothing more.

    Args:
        logger: any Lightning logger.
        report: what the profiler learned.
        report_dir: where its files lie, to be named; ``None`` if they could not be written.
        log_all: whether W&B gets all figures, and the timeline as series, too.
    """
    with training_goes_on(logger):
        match logger_kind(logger):
            case "WandbLogger":
                log_to_wandb(logger, report, log_all=log_all)
            case "TensorBoardLogger":
                _log_to_tensorboard(logger, report, report_dir)
            case "MLFlowLogger":
                _log_to_mlflow(logger, report)


def logger_kind(logger: Logger) -> str | None:
    """Which of the loggers that get more than numbers it is.

    Args:
        logger: any Lightning logger.

    Returns:
        The name of Lightning's class, or ``None``.
    """
    # By name, so that no logger's package is imported, and that both `lightning` and `pytorch_lightning`,
    # and subclasses of their loggers, are recognised.
    names = {cls.__name__ for cls in type(logger).__mro__}
    known = ("WandbLogger", "TensorBoardLogger", "MLFlowLogger")
    return next((name for name in known if name in names), None)


@contextmanager
def training_goes_on(logger: Logger) -> Iterator[None]:
    """Make a warning of whatever a logger fails by.

    Args:
        logger: who is given something.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception as error:
        cure = f"Install what {type(logger).__name__} needs. " if isinstance(error, ImportError) else ""
        warnings.warn(
            f"{type(logger).__name__} could not log the memory report: {type(error).__name__}: {error}. "
            f"{cure}Training goes on; the report's own files are not affected.",
            ReportWarning,
            stacklevel=3,
        )


def _log_to_tensorboard(logger: Any, report: MemoryReport, report_dir: Path | None) -> None:
    for stage in report.stages:
        logger.experiment.add_text(f"memory_report/{stage}", _markdown(report, stage, report_dir))


def _log_to_mlflow(logger: Any, report: MemoryReport) -> None:
    for name, text in ((JSON_NAME, report.to_json()), (HTML_NAME, render_html(report))):
        logger.experiment.log_text(logger.run_id, text, name)


def _markdown(report: MemoryReport, stage: str, report_dir: Path | None) -> str:
    """The tables of one stage as Markdown."""
    breakdown = report.stages[stage]
    source = "ledger" if breakdown.allocator_peak_bytes is None else "allocator"
    techniques = [f"- {_cell(str(record))}" for record in report.techniques]
    lines = [
        f"**{_cell(report.model)}, {stage}: peak {format_bytes(breakdown.peak_bytes)}** ({source})",
        "",
        *([*techniques, ""] if techniques else []),
        "| category | at peak MiB | max MiB |",
        "|---|--:|--:|",
    ]
    for category in breakdown.shown:
        held = breakdown.at_peak[category]
        maximum = "" if category is Category.WORKSPACE else f"{breakdown.maxima[category] / MIB:.2f}"
        lines.append(f"| {category} | {held / MIB:.2f} | {maximum} |")
    rule = "|---|---|" + "--:|" * len(MODULE_COLUMNS)
    lines += ["", f"| module | type | {' | '.join(f'{name}_mib' for name in MODULE_COLUMNS)} |", rule]
    for row in sorted(breakdown.modules, key=lambda row: -row.total_bytes)[:_NUM_TEXT_MODULES]:
        name, kind, *sizes = module_row(row, MIB)
        lines.append(f"| {_cell(name)} | {_cell(kind)} | {' | '.join(f'{size:.2f}' for size in sizes)} |")
    if report_dir is not None:
        lines += ["", f"All modules and the timeline: `{report_dir / HTML_NAME}`"]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "(model)"
