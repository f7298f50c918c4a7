"""A run's prediction is laid beside what was counted, and a prediction that fails stops nothing."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.core import CategoryBytes, MemoryBreakdown, ReportWarning
from lightning_memtrain.report import render_html
from lightning_memtrain.report.outputs.metric_names import comparison_metrics
from lightning_memtrain.report.outputs.report_table import print_table
from lightning_memtrain.report.predicted.predicted_step import ComparedBytes, PredictedStep
from tests.helpers.trainers import LIGHTNING_WARNINGS

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

WEIGHTS = 66 * 4


@dataclass
class Figures:
    """A prediction, as far as the profiler reads it."""

    allocated_bytes: int = 3 * WEIGHTS
    reserved_bytes: int = 2**21
    unknown: tuple[str, ...] = ("a loss at model.py:3",)
    notes: tuple[str, ...] = ()

    @property
    def breakdown(self) -> MemoryBreakdown:
        held = CategoryBytes({"parameters": WEIGHTS, "gradients": WEIGHTS})
        return MemoryBreakdown("A100 40GB (predicted)", held, held)


def fit(tmp_path: Path, predict: Any, *data: Any, model: Any = None) -> mt.MemoryReport:
    profiler = mt.MemoryProfiler(predict=predict, report_dir=tmp_path)
    trainer = pl.Trainer(
        max_steps=3,
        limit_val_batches=0,
        callbacks=[profiler],
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model or BoringModel(), *data)
    assert profiler.report is not None
    fit.metrics = dict(trainer.callback_metrics)  # type: ignore[attr-defined]
    return profiler.report


def test_figures_of_a_prediction_stand_beside_those_of_the_run(tmp_path: Path) -> None:
    report = fit(tmp_path, lambda model, **options: Figures())
    real = report.stages["fit"]
    compared = {row.name: row for row in report.compared}
    assert compared["ledger"] == ComparedBytes("ledger", 2 * WEIGHTS, real.ledger_peak_bytes)
    assert compared["parameters at the peak"].off == 0
    assert "reserved" not in compared  # the CPU's allocator reserves nothing ahead
    off = 2 * WEIGHTS / real.ledger_peak_bytes - 1
    assert comparison_metrics(report)["memory/predicted/ledger_off_percent"] == off * 100
    logged = fit.metrics["memory/predicted/ledger_off_percent"]  # type: ignore[attr-defined]
    assert torch.equal(logged, torch.tensor(off * 100, dtype=torch.float64))
    metrics = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "memory/predicted/allocator_mib" in metrics.splitlines()[0]


def test_table_page_and_file_have_the_comparison(tmp_path: Path) -> None:
    report = fit(tmp_path, lambda model, **options: Figures())
    text = io.StringIO()
    print_table(report, text)
    assert "A100 40GB (predicted), MiB" in text.getvalue()
    assert "Nobody knew beforehand: a loss at model.py:3" in text.getvalue()
    assert '"compared":[{"name":"ledger","predicted":528' in render_html(report)
    read = mt.MemoryReport.load(tmp_path / "memory_report.json")
    assert read.predicted == report.predicted == PredictedStep.of(Figures())
    assert read.compared == report.compared
    older = json.loads((tmp_path / "memory_report.json").read_text())
    del older["predicted"]
    assert mt.MemoryReport.from_dict(older).predicted is None


def test_what_cannot_be_predicted_is_said_and_stops_nothing(tmp_path: Path) -> None:
    def predict(model: Any, **options: Any) -> Any:
        raise ValueError("nobody knows this step.")

    with pytest.warns(
        ReportWarning, match=r"nothing was predicted for cpu: ValueError: nobody knows this step"
    ):
        report = fit(tmp_path, predict)
    assert report.compared == ()
    assert report.predicted is not None
    assert report.predicted.failure == "ValueError: nobody knows this step."
    text = io.StringIO()
    print_table(report, text)
    assert "Not predicted: ValueError: nobody knows this step." in text.getvalue()


@pytest.mark.parametrize("kind", ["own", "loader", "data module"])
def test_the_prediction_is_asked_for_the_run_as_it_is(tmp_path: Path, kind: str) -> None:
    asked: dict[str, Any] = {}

    def predict(model: Any, **options: Any) -> Figures:
        asked.update(options, devices={one.device.type for one in model.parameters()})
        return Figures()

    loader = DataLoader(RandomDataset(32, 64), batch_size=4)
    module = BoringDataModule()
    fit(tmp_path, predict) if kind == "own" else fit(
        tmp_path, predict, loader if kind == "loader" else module
    )
    data = asked["datamodule"]
    assert {
        "own": data is None,
        "loader": getattr(data, "train_dataloader", lambda: None)() is loader,
        "data module": data is module,
    }[kind]
    assert asked["device"] == "cpu"
    assert asked["devices"] == {"cpu"}
    assert isinstance(asked["trainer"], pl.Trainer)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a function or None, but got predict=True"):
        mt.MemoryProfiler(predict=True)  # type: ignore[arg-type]


def test_a_real_prediction_for_a_gpu_beside_a_run_on_the_cpu(tmp_path: Path) -> None:
    def on_a_gpu(model: Any, **options: Any) -> Any:
        return mt.predict(model, **{**options, "device": "A100 40GB"})

    report = fit(tmp_path, on_a_gpu)
    compared = {row.name: row for row in report.compared}
    for name in ("parameters", "gradients"):
        row = compared[f"{name} at the peak"]
        assert row.predicted_bytes == row.counted_bytes == WEIGHTS
