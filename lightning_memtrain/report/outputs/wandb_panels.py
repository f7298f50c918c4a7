"""What Weights & Biases is given: panels, figures to compare runs by, and what to group them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lightning_memtrain.core import GIB, MIB, Category, MemoryBreakdown, TechniqueRecord
from lightning_memtrain.report.memory_report import JSON_NAME, MemoryReport
from lightning_memtrain.report.outputs.html import render_html
from lightning_memtrain.report.outputs.metric_names import (
    FIVE_DIGITS_BYTES,
    breakdown_metrics,
    comparison_metrics,
    essential_metrics,
    in_gib,
)
from lightning_memtrain.report.outputs.module_columns import MODULE_COLUMNS, module_row
from lightning_memtrain.report.outputs.timeline_chart import render_timeline

TIMELINE_STEP = "memtrain/event"
# Every point is a row of W&B's history; the artifact holds them all.
_MAX_TIMELINE_POINTS = 1000
_STAGES = ("fit", "validate", "test", "predict")
_LEDGER_CATEGORIES = tuple(category for category in Category if category is not Category.WORKSPACE)
_TIMELINE_NAMES = (*map(str, _LEDGER_CATEGORIES), "total")
# Per W&B run, the breakdown of each stage whose timeline it has: the report after `test` holds `fit` again.
_drawn: WeakKeyDictionary[Any, dict[str, MemoryBreakdown]] = WeakKeyDictionary()


def define_axis(logger: Any) -> None:
    """Give the series of the timeline an axis of their own.

    Args:
        logger: a WandbLogger.
    """
    # Lightning draws everything over `trainer/global_step`; an event within one step has no place there, and
    # its last value means nothing. W&B obeys `summary="none"` only for whole names, not for a pattern.
    run = logger.experiment
    run.define_metric(TIMELINE_STEP, hidden=True, summary="none")
    for stage in _STAGES:
        for name in _TIMELINE_NAMES:
            key = _timeline_key(stage, name)
            run.define_metric(key, step_metric=TIMELINE_STEP, step_sync=False, summary="none")


def describe(logger: Any, techniques: Sequence[TechniqueRecord], **others: Any) -> None:
    """Put techniques with their settings into the run's configuration, as ``config.memtrain``.

    Args:
        logger: a WandbLogger.
        techniques: of the run.
        **others: entries besides, such as the recipe's name; what is there already stays.
    """
    config = getattr(logger.experiment, "config", None)
    if config is None:
        return  # no run of W&B's, as where wandb is missing
    before = config.get("memtrain")
    described = {
        **(before if isinstance(before, Mapping) else {}),
        "technique": " + ".join(sorted(record.name for record in techniques)) or "none",
        "techniques": {record.name: dict(record.settings) for record in techniques},
        **others,
    }
    config.update({"memtrain": described}, allow_val_change=True)


def log_to_wandb(logger: Any, report: MemoryReport, *, log_all: bool) -> None:
    """Log a finished report.

    Args:
        logger: a WandbLogger.
        report: of the run.
        log_all: whether the summary gets all figures, and the history the timeline.
    """
    import wandb

    run = logger.experiment
    describe(logger, report.techniques)
    large = max((one.peak_bytes for one in report.stages.values()), default=0) >= FIVE_DIGITS_BYTES
    unit_bytes, unit = (GIB, "gib") if large else (MIB, "mib")
    # No call passes `step=`: W&B drops what is not newer than its last step, and Lightning counts otherwise.
    panels: dict[str, Any] = {"memory_report/page": wandb.Html(render_html(report), inject=False)}
    figures: dict[str, float] = {}
    for stage, breakdown in report.stages.items():
        rows = [module_row(row, unit_bytes) for row in breakdown.modules]
        columns: list[str | int] = ["module", "type", *(f"{name}_{unit}" for name in MODULE_COLUMNS)]
        panels[f"memory_report/{stage}/modules"] = wandb.Table(columns, rows)
        held = [[str(category), size / unit_bytes] for category, size in breakdown.at_peak.items()]
        title = f"{stage}: {unit[0].upper()}iB at the peak"
        panels[f"memory_report/{stage}/at_peak"] = wandb.plot.bar(
            wandb.Table(["category", unit], held), "category", unit, title=title
        )
        drawn = _drawn.setdefault(run, {})
        if drawn.get(stage) != breakdown:
            if breakdown.timeline:
                chart = wandb.Html(render_timeline(breakdown), inject=False)
                panels[f"memory_report/{stage}/timeline"] = chart
            for point in _timeline_points(stage, breakdown) if log_all else ():
                run.log(in_gib(point) if large else point)
            drawn[stage] = breakdown
        growth_bytes = sum(row.num_bytes for row in report.growth.get(stage, ()))
        metrics = breakdown_metrics(breakdown, stage, growth_bytes)
        figures |= metrics if log_all else essential_metrics(metrics)
    run.log(panels)
    figures |= comparison_metrics(report)
    run.summary.update(in_gib(figures) if large else figures)
    artifact = wandb.Artifact(f"memory-report-{run.id}", type="memory-profile")
    with artifact.new_file(JSON_NAME, mode="w", encoding="utf-8") as file:
        file.write(report.to_json())
    run.log_artifact(artifact)


def _timeline_points(stage: str, breakdown: MemoryBreakdown) -> Iterator[dict[str, float]]:
    """The timeline's events in MiB, or the highest of each stretch of them if there are too many."""
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
