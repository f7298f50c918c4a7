"""``metrics.csv``, directly in the run's folder, which a resumed run goes on with."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_memtrain.compat.lightning_private import FabricExperimentWriter


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger without its own folders, and without deleting an earlier run's file.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        # Every row at once: a run that is killed should leave all that it logged.
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> FabricExperimentWriter:
        """The writer of ``metrics.csv``, made when it is first asked for."""
        if self._experiment is None:
            self._experiment = _Continued(log_dir=self.log_dir)
        return self._experiment


class _Continued(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        """Lightning deletes the file here."""
