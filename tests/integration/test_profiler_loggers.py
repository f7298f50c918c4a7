from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn

from lightning_memtrain.core import MIB, ReportWarning
from lightning_memtrain.report import MemoryProfiler
from tests.helpers.boring_models import WIDTH, BoringModel
from tests.helpers.trainers import LIGHTNING_WARNINGS, fit, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


class Recorder(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = version = "recorder"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def memory_rows(self) -> list[tuple[int | None, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(key.startswith("memory/") for key in row)]


def test_watched_steps_and_epochs_are_logged_with_one_set_of_keys(tmp_path: Path):
    recorder = Recorder()
    profiler = MemoryProfiler(every_n_steps=3)
    fit(BoringModel(num_batches=5), profiler, tmp_path, max_epochs=2, logger=recorder)
    rows = recorder.memory_rows()
    training = [(step, row) for step, row in rows if "memory/peak_mib" in row]
    validation = [(step, row) for step, row in rows if "memory/validate/peak_mib" in row]
    assert [step for step, _ in training] == [0, 1, 2, 3, 6, 9]
    # Validation runs before Lightning counts the step that it follows.
    assert [step for step, _ in validation] == [4, 9]
    assert len(rows) == len(training) + len(validation)
    for group in (training, validation):
        assert len({frozenset(row) for _, row in group}) == 1
    assert profiler.report is not None
    peaks = [step.peak_bytes for step in profiler.report.steps if step.stage == "fit"]
    assert [row["memory/peak_mib"] * MIB for _, row in training] == peaks
    assert all(type(value) is float for _, row in rows for value in row.values())


def test_several_loggers_get_the_same(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorders = [Recorder(), Recorder()]
    loggers = [
        CSVLogger(tmp_path, name="csv", version=""),
        TensorBoardLogger(tmp_path, name="tb", version=""),
    ]
    profiler = MemoryProfiler()
    fit(BoringModel(num_batches=4), profiler, tmp_path, logger=[*recorders, *loggers], log_every_n_steps=1)
    assert recorders[0].memory_rows() == recorders[1].memory_rows() != []
    expected = [(step, row["memory/peak_mib"]) for step, row in recorders[0].rows if "memory/peak_mib" in row]
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["memory/peak_mib"]]
    assert [(int(row["step"]), float(row["memory/peak_mib"])) for row in rows] == expected
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    scalars = events.Scalars("memory/peak_mib")
    assert [scalar.step for scalar in scalars] == [step for step, _ in expected]
    assert [scalar.value for scalar in scalars] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert "memory_report/fit/text_summary" in events.Tags()["tensors"]


def test_a_csv_file_is_not_rewritten_for_new_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lightning.fabric.loggers.csv_logs import _ExperimentWriter

    rewrites: list[int] = []
    rewrite = _ExperimentWriter._rewrite_with_new_header
    monkeypatch.setattr(
        _ExperimentWriter, "_rewrite_with_new_header", lambda *args: (rewrites.append(1), rewrite(*args))[1]
    )

    class Silent(BoringModel):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.loss(batch)

    logger = CSVLogger(tmp_path, name="csv", version="", flush_logs_every_n_steps=1)
    fit(Silent(), MemoryProfiler(every_n_steps=1), tmp_path, logger=logger, limit_val_batches=0, max_epochs=2)
    assert len((tmp_path / "csv" / "metrics.csv").read_text().splitlines()) == 1 + 12
    assert rewrites == []


class Grows(BoringModel):
    """Each epoch needs more memory than the one before, until the fourth."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        ballast = self.head(batch.repeat(100 * min(self.current_epoch + 1, 3), 1)).square().mean()
        return ballast + self.loss(batch)


@pytest.fixture
def no_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is the ledger's: steps of the same shape have the same, whatever happens between epochs."""
    monkeypatch.setattr("lightning_memtrain.report.profiler.allocator_statistics", lambda device: None)


@pytest.mark.usefixtures("no_truth")
def test_early_stopping_watches_the_peak(tmp_path: Path):
    stopping = EarlyStopping(monitor="memory/peak_mib", mode="max", patience=1)
    profiler = MemoryProfiler(every_n_steps=1)
    trainer = quiet_trainer(tmp_path, profiler, stopping, max_epochs=10)
    trainer.fit(Grows(num_batches=2))
    # Higher in epochs 0, 1, 2; epoch 3 is no higher.
    assert trainer.current_epoch == 4
    assert float(stopping.best_score) * MIB == profiler.breakdowns["fit"].peak_bytes


def test_early_stopping_watches_validation(tmp_path: Path):
    stopping = EarlyStopping(
        monitor="memory/validate/growth_mib", mode="min", stopping_threshold=0.0, patience=9
    )
    trainer = quiet_trainer(tmp_path, MemoryProfiler(), stopping, max_epochs=10)
    trainer.fit(BoringModel(num_batches=2))
    assert float(stopping.best_score) == 0.0


@pytest.mark.usefixtures("no_truth")
def test_a_checkpoint_for_the_lowest_peak(tmp_path: Path):
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="memory/peak_mib", mode="min", filename="{epoch}", save_on_train_epoch_end=True
    )
    profiler = MemoryProfiler(every_n_steps=1)
    quiet_trainer(tmp_path, profiler, checkpoint, max_epochs=3, enable_checkpointing=True).fit(
        Grows(num_batches=2)
    )
    assert Path(checkpoint.best_model_path).name == "epoch=0.ckpt"
    assert 0 < float(checkpoint.best_model_score) * MIB < profiler.breakdowns["fit"].peak_bytes
    torch.load(checkpoint.best_model_path, weights_only=True)


def test_a_wandb_logger_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class WandbLogger(Recorder):
        """What is left of Lightning's logger where wandb was removed after it was made."""

        experiment = SimpleNamespace(define_metric=lambda *args, **kwargs: None)

    monkeypatch.setitem(sys.modules, "wandb", None)
    recorder = WandbLogger()
    profiler = MemoryProfiler()
    with pytest.warns(
        ReportWarning, match=r"WandbLogger could not log.*wandb.*Install what WandbLogger needs"
    ):
        trainer = fit(BoringModel(num_batches=2), profiler, tmp_path, logger=recorder)
    assert trainer.state.finished
    assert recorder.memory_rows()
    assert (tmp_path / "memory" / "memory_report.json").is_file()


def _run_cli(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # what Lightning still calls
    return LightningCLI(BoringModel, save_config_callback=None, seed_everything_default=False)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_memtrain.report.MemoryProfiler
      init_args:
        every_n_steps: 7
        timeline: false
        report_dir: {tmp_path / "from_yaml"}
"""
    )
    cli = _run_cli(monkeypatch, "fit", "--config", str(config))
    (profiler,) = (c for c in cli.trainer.callbacks if isinstance(c, MemoryProfiler))
    assert profiler.every_n_steps == 7
    assert profiler.breakdowns["fit"].timeline == ()
    assert (tmp_path / "from_yaml" / "memory_report.json").is_file()


@pytest.mark.parametrize("wrong", ["often", "0", "2.5"])
def test_from_the_command_line_a_wrong_argument_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    callback = "--trainer.callbacks=lightning_memtrain.report.MemoryProfiler"
    with pytest.raises((SystemExit, ValueError)) as caught:
        _run_cli(monkeypatch, "fit", callback, f"--trainer.callbacks.every_n_steps={wrong}")
    assert "every_n_steps" in capsys.readouterr().err + str(caught.value)


def test_lazy_layers(tmp_path: Path):
    class Lazy(BoringModel):
        def __init__(self) -> None:
            super().__init__(num_batches=3)
            self.body = nn.LazyLinear(WIDTH)
            self(torch.ones(1, WIDTH))

    profiler = MemoryProfiler()
    fit(Lazy(), profiler, tmp_path)
    assert profiler.report is not None
    assert profiler.report.num_parameters == sum(p.numel() for p in BoringModel().parameters())
