"""What is told of a run while it goes on, and at its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_memtrain.core import MIB, MemoryBreakdown
from lightning_memtrain.report.growth import total_bytes
from lightning_memtrain.report.memory_report import MemoryReport
from lightning_memtrain.report.outputs.metric_names import breakdown_metrics
from lightning_memtrain.report.outputs.publishing import ReportFiles, publish_report
from lightning_memtrain.report.outputs.sent_metrics import SentMetrics
from lightning_memtrain.report.run_recorder import RunRecorder, StageRecorder
from lightning_memtrain.report.suggestions import Suggestions
from lightning_memtrain.report.trainer_state import compare_ranks, stage_name, technique_records


class RunTelling:
    """Tells trainer, loggers, files and terminal of one run.

    Args:
        max_rows: rows of a kind that a stage has in the JSON file; ``None`` for all.
        log_all: whether loggers get all metrics.
    """

    def __init__(self, max_rows: int | None, log_all: bool) -> None:
        self._max_rows = max_rows
        self._log_all = log_all
        self._metrics = SentMetrics(log_all)
        self._files: ReportFiles | None = None
        self._suggestions = Suggestions()

    def publish(
        self,
        trainer: Trainer,
        run: RunRecorder,
        stage: StageRecorder,
        *,
        all_ranks: bool,
        reads_every_step: bool,
    ) -> None:
        """Log what was measured since the last time.

        Args:
            trainer: the running trainer.
            run: what is known of its run.
            stage: the present one.
            all_ranks: whether every rank is here.
            reads_every_step: whether the allocator's peak of every step is known.
        """
        measured = stage.take_unpublished()
        metrics: dict[str, float] = {}
        prefix = "memory" if stage.name == "fit" else f"memory/{stage.name}"
        if all_ranks:
            of_ranks = compare_peaks(trainer, run, measured.breakdown)
            if measured.breakdown is not None:
                metrics |= breakdown_metrics(measured.breakdown, stage.name, total_bytes(stage.growth))
                for end, num_bytes in of_ranks.items():
                    metrics[f"{prefix}/ranks/{end}_peak_mib"] = num_bytes / MIB
        if reads_every_step and measured.allocator_peak_bytes is not None:
            metrics[f"{prefix}/allocator_peak_mib"] = measured.allocator_peak_bytes / MIB
        if metrics:
            self._metrics.send(trainer, metrics)

    def finish(
        self, trainer: Trainer, model: LightningModule, run: RunRecorder, folder: Path
    ) -> MemoryReport | None:
        """Write, log and print the report.

        Args:
            trainer: the trainer whose run is over.
            model: its module.
            run: what is known of it.
            folder: for the report.

        Returns:
            The report; ``None`` if there is nothing to report.
        """
        report = run.report(model, technique_records(trainer))
        name = stage_name(trainer)
        # A test that failed before its first step has nothing to add to the report of the fit before.
        if report is None or (name != "fit" and name not in report.stages):
            return None
        if name == "fit" and "fit" in report.stages:
            failure = report.out_of_memory
            held_bytes = report.stages["fit"].peak_bytes if failure is None else failure.held_bytes
            lines = self._suggestions.ask(trainer, model, held_bytes, failure is not None)
            report = replace(report, suggestions=lines)
        if name == "fit":
            self._metrics.send_comparison(trainer, report)
        if self._files is None:
            self._files = ReportFiles(folder, self._max_rows)
        publish_report(report, trainer, self._files, log_all=self._log_all)
        return report


def compare_peaks(trainer: Trainer, run: RunRecorder, breakdown: MemoryBreakdown | None) -> dict[str, int]:
    """Compare the peaks of several ranks, all of which have to call it; the run's are written down.

    Args:
        trainer: the trainer.
        run: what is known of its run.
        breakdown: of the present step; ``None`` for none.

    Returns:
        The highest and the lowest peak of the present step, ``"max"`` and ``"min"``; nothing of one rank.
    """
    compared = compare_ranks(trainer, (0 if breakdown is None else breakdown.peak_bytes, run.peak_bytes))
    if compared is None:
        return {}
    (highest, lowest), (run_highest, run_lowest) = compared
    run.ranks = {
        "world_size": trainer.world_size,
        "max_peak_bytes": run_highest,
        "min_peak_bytes": run_lowest,
    }
    return {"max": highest, "min": lowest}
