"""Metrics of a run on their way to the trainer and its loggers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

from lightning_memtrain.core import MIB
from lightning_memtrain.report.memory_report import MemoryReport
from lightning_memtrain.report.outputs.loggers import log_scalars
from lightning_memtrain.report.outputs.metric_names import (
    FIVE_DIGITS_BYTES,
    comparison_metrics,
    essential_metrics,
    in_gib,
)


class SentMetrics:
    """Sends metrics of a run: all to ``trainer.callback_metrics``, for monitors, and some to loggers.

    Loggers get at most a dozen, in GiB if the first peak that they get would need five digits in MiB; a unit
    that changed within a run would break its curves.

    Args:
        log_all: whether loggers get all of them.
    """

    def __init__(self, log_all: bool) -> None:
        self._log_all = log_all
        self._in_gib: bool | None = None

    def send(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Send what a step or an epoch has shown.

        Args:
            trainer: the running trainer.
            metrics: values in MiB by key.
        """
        tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in metrics.items()}
        trainer.callback_metrics.update(tensors)
        shown = dict(metrics) if self._log_all else essential_metrics(metrics)
        if self._in_gib is None:
            peaks = (value for key, value in shown.items() if key.endswith("peak_mib"))
            self._in_gib = max(peaks, default=0.0) * MIB >= FIVE_DIGITS_BYTES
        log_scalars(trainer, in_gib(shown) if self._in_gib else shown)

    def send_comparison(self, trainer: Trainer, report: MemoryReport) -> None:
        """Send how far off a prediction was.

        Args:
            trainer: the trainer.
            report: of its run.
        """
        if report.compared:
            self.send(trainer, comparison_metrics(report))
