"""What each of Lightning's loggers is given, beyond scalars; a logger that fails never ends the training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning.fabric.utilities import rank_zero_only

from lightning_memtrain.compat.lightning_private import batches_that_stepped
from lightning_memtrain.core import MIB, Category, MemoryBreakdown, ModuleMemory, ReportWarning, format_bytes
from lightning_memtrain.report.memory_report import HTML_NAME, JSON_NAME, MemoryReport
from lightning_memtrain.report.outputs.html import render_html
from lightning_memtrain.report.outputs.metric_names import breakdown_metrics, comparison_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger

TIMELINE_STEP = "memtrain/event"
# Every point is a row of W&B's history; the artifact holds them all.
_MAX_TIMELINE_POINTS = 1000
_NUM_TEXT_MODULES = 20
_STAGES = ("fit", "validate", "test", "predict")
_LEDGER_CATEGORIES = tuple(category for category in Category if category is not Category.WORKSPACE)
_TIMELINE_NAMES = (*map(str, _LEDGER_CATEGORIES), "total")
# Per W&B run, the breakdown of each stage whose timeline it has: the report after `test` holds `fit` again.
_drawn: WeakKeyDictionary[Any, dict[str, MemoryBreakdown]] = WeakKeyDictionary()
_MODULE_COLUMNS: dict[str, Callable[[ModuleMemory], int]] = {
    "total_mib": lambda row: row.total_bytes,
    "produced_mib": lambda row: row.produced_bytes,
    "saved_mib": lambda row: row.saved_bytes,
    "parameters_mib": lambda row: row.parameters_bytes,
    "buffers_mib": lambda row: row.buffers_bytes,
    "gradients_mib": lambda row: row.gradients_bytes,
    "optimizer_state_mib": lambda row: row.optimizer_state_bytes,
}


@rank_zero_only
def define_metrics(logger: Logger) -> None:
    """Give the timeline its own axis, where the logger knows axes (W&B); call before anything is logged.

    Args:
        logger: any Lightning logger.
    """
    with training_goes_on(logger):
        if logger_kind(logger) == "WandbLogger":
            _define_wandb_axis(logger)


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
def log_report(logger: Logger, report: MemoryReport, report_dir: Path | None) -> None:
    """Send a finished report in the richest form that the logger knows.

    W&B gets tables, charts, the page, the timeline, the summary and the JSON as an artifact; TensorBoard
    tables as text; MLflow both files. Other loggers have the scalars and get nothing more.

    Args:
        logger: any Lightning logger.
        report: what the profiler learned.
        report_dir: where its files lie, to be named; ``None`` if they could not be written.
    """
    with training_goes_on(logger):
        match logger_kind(logger):
            case "WandbLogger":
                _log_to_wandb(logger, report)
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


def _json(report: MemoryReport) -> str:
    return json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"


def _define_wandb_axis(logger: Any) -> None:
    # Lightning draws everything over `trainer/global_step`; an event within one step has no place there, and
    # its last value means nothing. W&B obeys `summary="none"` only for whole names, not for a pattern.
    run = logger.experiment
    run.define_metric(TIMELINE_STEP, hidden=True, summary="none")
    for stage in _STAGES:
        for name in _TIMELINE_NAMES:
            key = _timeline_key(stage, name)
            run.define_metric(key, step_metric=TIMELINE_STEP, step_sync=False, summary="none")


def _log_to_wandb(logger: Any, report: MemoryReport) -> None:
    import wandb

    run = logger.experiment
    # No call passes `step=`: W&B drops what is not newer than its last step, and Lightning counts otherwise.
    panels: dict[str, Any] = {"memory_report/page": wandb.Html(render_html(report), inject=False)}
    for stage, breakdown in report.stages.items():
        rows = [_module_row(row) for row in breakdown.modules]
        panels[f"memory_report/{stage}/modules"] = wandb.Table(["module", "type", *_MODULE_COLUMNS], rows)
        held = [[str(category), num_bytes / MIB] for category, num_bytes in breakdown.at_peak.items()]
        panels[f"memory_report/{stage}/at_peak"] = wandb.plot.bar(
            wandb.Table(["category", "mib"], held), "category", "mib", title=f"{stage}: MiB at the peak"
        )
        drawn = _drawn.setdefault(run, {})
        if drawn.get(stage) != breakdown:
            for point in _timeline_points(stage, breakdown):
                run.log(point)
            drawn[stage] = breakdown
        growth_bytes = sum(row.num_bytes for row in report.growth.get(stage, ()))
        run.summary.update(breakdown_metrics(breakdown, stage, growth_bytes))
    run.log(panels)
    run.summary.update(comparison_metrics(report))
    artifact = wandb.Artifact(f"memory-report-{run.id}", type="memory-profile")
    with artifact.new_file(JSON_NAME, mode="w", encoding="utf-8") as file:
        file.write(_json(report))
    run.log_artifact(artifact)


def _log_to_tensorboard(logger: Any, report: MemoryReport, report_dir: Path | None) -> None:
    for stage in report.stages:
        logger.experiment.add_text(f"memory_report/{stage}", _markdown(report, stage, report_dir))


def _log_to_mlflow(logger: Any, report: MemoryReport) -> None:
    for name, text in ((JSON_NAME, _json(report)), (HTML_NAME, render_html(report))):
        logger.experiment.log_text(logger.run_id, text, name)


def _module_row(row: ModuleMemory) -> list[Any]:
    return [row.name, row.type_name, *(num_bytes(row) / MIB for num_bytes in _MODULE_COLUMNS.values())]


def _timeline_points(stage: str, breakdown: MemoryBreakdown) -> Iterator[dict[str, float]]:
    """The timeline's events, or the highest of each stretch of them if there are too many."""
    events = breakdown.timeline
    stretch = -(-len(events) // _MAX_TIMELINE_POINTS) or 1
    for start in range(0, len(events), stretch):
        event = max(events[start : start + stretch], key=lambda event: event.held.total_bytes)
        sizes = [event.held[category] for category in _LEDGER_CATEGORIES] + [event.held.total_bytes]
        scalars = {
            _timeline_key(stage, name): size / MIB for name, size in zip(_TIMELINE_NAMES, sizes, strict=True)
        }
        yield {TIMELINE_STEP: event.index, **scalars}


def _timeline_key(stage: str, name: str) -> str:
    return f"memory_timeline/{name}_mib" if stage == "fit" else f"memory_timeline/{stage}/{name}_mib"


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
    rule = "|---|---|" + "--:|" * len(_MODULE_COLUMNS)
    lines += ["", f"| module | type | {' | '.join(_MODULE_COLUMNS)} |", rule]
    for row in sorted(breakdown.modules, key=lambda row: -row.total_bytes)[:_NUM_TEXT_MODULES]:
        name, kind, *sizes = _module_row(row)
        lines.append(f"| {_cell(name)} | {_cell(kind)} | {' | '.join(f'{size:.2f}' for size in sizes)} |")
    if report_dir is not None:
        lines += ["", f"All modules and the timeline: `{report_dir / HTML_NAME}`"]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "(model)"
