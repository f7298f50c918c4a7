"""Real loggers, written without a server and read back: what they hold equals the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import lightning_memtrain as mt
from lightning_memtrain.core import GIB, MIB, Category, CategoryBytes
from lightning_memtrain.report.memory_report import MemoryReport
from lightning_memtrain.report.outputs.html import render_html
from lightning_memtrain.report.outputs.loggers import define_metrics, log_report
from tests.helpers.boring_models import BoringModel
from tests.helpers.cli import TINY, memtrain
from tests.helpers.reports import deep_report, tiny_report
from tests.helpers.stand_in_search import StandInSearch, stand_in
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer
from tests.helpers.wandb_log import WandbLog, read_wandb_log

__all__ = ["stand_in"]

LEDGER_CATEGORIES = [category for category in Category if category is not Category.WORKSPACE]


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds all that W&B writes; the process's environment is as before afterwards."""
    pytest.importorskip("wandb")
    # WandbLogger(offline=True) sets this for the whole process; set here, monkeypatch takes it back.
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    yield tmp_path
    import wandb

    wandb.teardown()


def logged_to_wandb(report: MemoryReport, folder: Path, *, log_all: bool = True) -> WandbLog:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    save_dir = folder / "runs"
    save_dir.mkdir()
    logger = WandbLogger(project="memtrain", save_dir=save_dir, offline=True)
    define_metrics(logger, log_all=log_all)
    logger.log_metrics({"memory/peak_mib": 1.5}, step=3)
    log_report(logger, report, folder, log_all=log_all)
    logger.log_metrics({"memory/peak_mib": 2.5}, step=4)
    wandb.finish()
    # Only when its service has ended is the file sure to be whole.
    wandb.teardown()
    return read_wandb_log(save_dir)


def test_wandb_file_holds_exactly_what_the_report_holds(wandb_folder: Path) -> None:
    report = tiny_report()
    log = logged_to_wandb(report, wandb_folder)
    plain = report.to_dict()

    for stage, prefix in (("fit", "memory"), ("validate", "memory/validate")):
        table = json.loads(log.media(f"memory_report/{stage}/modules"))
        read_back = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        for module, row in zip(plain["stages"][stage]["modules"], read_back, strict=True):
            assert (row["module"], row["type"]) == (module["name"], module["type_name"])
            for name in ("produced", "saved", "parameters", "buffers", "gradients", "optimizer_state"):
                assert row[f"{name}_mib"] * MIB == module[f"{name}_bytes"]
        bars = json.loads(log.media(f"memory_report/{stage}/at_peak_table"))
        assert {name: mib * MIB for name, mib in bars["data"]} == plain["stages"][stage]["at_peak"]
        chart = log.config["_wandb"]["visualize"][f"memory_report/{stage}/at_peak"]
        assert chart["panel_config"]["panelDefId"] == "wandb/bar/v0"
        assert chart["panel_config"]["fieldSettings"] == {"label": "category", "value": "mib"}
        for category, num_bytes in plain["stages"][stage]["at_peak"].items():
            assert log.summary[f"{prefix}/at_peak/{category}_mib"] * MIB == num_bytes
        for category in LEDGER_CATEGORIES:
            maximum = plain["stages"][stage]["maxima"][category.value]
            assert log.summary[f"{prefix}/max/{category}_mib"] * MIB == maximum

    assert log.summary["memory/ledger_peak_mib"] == 50
    assert log.summary["memory/growth_mib"] == 4
    assert log.summary["memory/validate/peak_mib"] == 50
    assert log.media("memory_report/page") == render_html(report)
    (artifact,) = [name for name, kind in log.artifacts.items() if kind == "memory-profile"]
    assert artifact.startswith("memory-report-")
    (path,) = [path for (name, _), path in log.artifact_files.items() if name == artifact]
    assert MemoryReport.load(path) == report


def test_wandb_timeline_has_its_own_axis_and_lightnings_is_undisturbed(wandb_folder: Path) -> None:
    report = tiny_report()
    log = logged_to_wandb(report, wandb_folder)
    timeline = report.stages["fit"].timeline

    for category in (*LEDGER_CATEGORIES, "total"):
        assert log.step_metrics[f"memory_timeline/{category}_mib"] == "memtrain/event"
        assert log.step_metrics[f"memory_timeline/validate/{category}_mib"] == "memtrain/event"
    assert log.step_metrics["*"] == "trainer/global_step"
    assert log.series("memtrain/event") == [0, 1, 2, 3, 4]
    for category in LEDGER_CATEGORIES:
        values = log.series(f"memory_timeline/{category}_mib")
        assert [value * MIB for value in values] == [event.held[category] for event in timeline]
    assert log.series("memory_timeline/total_mib") == [14, 38, 46, 50, 18]
    assert not [key for key in log.summary if key.startswith("memory_timeline")]
    # Scalars that Lightning logs before and after keep their own step.
    assert log.series("memory/peak_mib") == [1.5, 2.5]
    assert [row["trainer/global_step"] for row in log.history if "memory/peak_mib" in row] == [3, 4]


def test_wandb_timeline_is_not_drawn_again_by_a_later_report_of_the_same_run(wandb_folder: Path) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    report = tiny_report()
    after_fit = replace(report, stages={"fit": report.stages["fit"]})
    later = replace(report, stages={**after_fit.stages, "test": report.stages["fit"]})
    logger = WandbLogger(project="memtrain", save_dir=wandb_folder, offline=True)
    define_metrics(logger, log_all=True)
    log_report(logger, after_fit, wandb_folder, log_all=True)
    log_report(logger, later, wandb_folder, log_all=True)
    wandb.finish()
    wandb.teardown()
    log = read_wandb_log(wandb_folder)
    assert log.series("memory_timeline/total_mib") == [14, 38, 46, 50, 18]
    assert log.series("memory_timeline/test/total_mib") == [14, 38, 46, 50, 18]
    assert len(log.series("memory_report/page")) == 2


@pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)
def test_wandb_gets_a_dozen_scalars_and_what_to_group_runs_by(wandb_folder: Path) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="memtrain", save_dir=wandb_folder / "runs", offline=True)
    (wandb_folder / "runs").mkdir()
    profiler = mt.MemoryProfiler(every_n_steps=1, report_dir=wandb_folder / "report")
    trainer = quiet_trainer(
        wandb_folder, profiler, mt.Microbatching(num_microbatches=2), logger=logger, max_epochs=1
    )
    trainer.fit(BoringModel(num_batches=2))
    wandb.finish()
    wandb.teardown()
    log = read_wandb_log(wandb_folder / "runs")
    logged = {key for row in log.history for key in row if key.startswith("memory/")}
    shown = {"parameters", "gradients", "optimizer_state", "activations", "workspace", "other"}
    assert logged == {
        *("memory/peak_mib", "memory/growth_mib", "memory/validate/peak_mib"),
        *(f"memory/at_peak/{name}_mib" for name in shown),
    }
    assert {key for key in log.summary if key.startswith("memory/")} == logged
    assert not [key for row in log.history for key in row if key.startswith("memory_timeline/")]
    parts = [log.summary[f"memory/at_peak/{name}_mib"] for name in shown]
    assert sum(parts) == pytest.approx(log.summary["memory/peak_mib"], rel=1e-12)
    described = log.config["memtrain"]
    described = described.get("value", described)
    assert described["technique"] == "Microbatching"
    assert described["techniques"]["Microbatching"]["num_microbatches"] == 2
    chart = log.media("memory_report/fit/timeline")
    assert "var(--parameters)" in chart
    assert "<script" not in chart


def test_wandb_gets_gib_where_mib_would_have_five_digits(wandb_folder: Path) -> None:
    report = tiny_report()
    fit = report.stages["fit"]
    large = replace(fit, at_peak=CategoryBytes({"parameters": 8 * GIB, "activations": 4 * GIB}), timeline=())
    log = logged_to_wandb(replace(report, stages={"fit": large}), wandb_folder, log_all=False)
    assert log.summary["memory/peak_gib"] == 12
    assert log.summary["memory/at_peak/activations_gib"] == 4
    bars = json.loads(log.media("memory_report/fit/at_peak_table"))
    assert bars["columns"] == ["category", "gib"]
    assert dict(bars["data"])["parameters"] == 8
    assert json.loads(log.media("memory_report/fit/modules"))["columns"][2] == "total_gib"


def test_wandb_run_holds_no_key_of_the_system_panels(wandb_folder: Path) -> None:
    log = logged_to_wandb(tiny_report(), wandb_folder)
    ours = {key for row in log.history for key in row if not key.startswith(("_", "trainer/"))}
    assert {key.split("/")[0] for key in ours} == {"memory", "memory_report", "memory_timeline", "memtrain"}


def test_wandb_gets_at_most_a_thousand_points_of_a_long_timeline_with_its_peak(wandb_folder: Path) -> None:
    report = deep_report(num_blocks=12, events_per_module=20)
    fit = report.stages["fit"]
    assert len(fit.timeline) == 2402
    log = logged_to_wandb(report, wandb_folder)
    totals = log.series("memory_timeline/total_mib")
    assert len(totals) == 801
    assert max(totals) * MIB == fit.ledger_peak_bytes


@pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)
def test_wandb_holds_the_page_of_a_plan_and_its_front_as_a_chart(
    wandb_folder: Path, stand_in: StandInSearch
) -> None:
    import torch
    import wandb
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.loggers import WandbLogger

    save_dir = wandb_folder / "runs"
    save_dir.mkdir()
    logger = WandbLogger(project="memtrain", save_dir=save_dir, offline=True)
    callback = mt.FitMemory(32 * 3 * 66 * 4)
    trainer = quiet_trainer(wandb_folder, callback, logger=logger, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(BoringModel(), torch.utils.data.DataLoader(torch.ones(16, 32), batch_size=8))
    plan = callback.plan
    assert plan is not None
    assert plan.chosen is not None
    wandb.finish()
    wandb.teardown()
    log = read_wandb_log(save_dir)
    page = log.media("memory_plan/page")
    assert page.startswith("<!doctype html>")
    assert page.count("<circle") == len(plan.front)
    table = json.loads(log.media("memory_plan/front_table"))
    assert table["columns"] == ["way", "needed_mib", "time_ratio", "exact"]
    ways = list(dict.fromkeys((plan.chosen, *plan.front)))
    assert table["data"] == [
        [str(way), way.reserved_bytes / MIB, way.time_ratio, True]  # type: ignore[operator]
        for way in ways
    ]
    assert log.summary["memory_plan/limit_mib"] == plan.limit_bytes / MIB
    assert log.summary["memory_plan/way"] == str(plan.chosen)


def test_tensorboard_file_holds_the_tables(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="run")
    log_report(logger, tiny_report(), tmp_path)
    logger.finalize("success")
    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["tensors"] == [
        "memory_report/fit/text_summary",
        "memory_report/validate/text_summary",
    ]
    (event,) = events.Tensors("memory_report/fit/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "**TinyModel, fit: peak 56.00 MiB** (allocator)" in text
    assert "| activations | 32.00 | 32.00 |" in text
    assert "| body | Linear | 33.00 | 24.00 | 20.00 | 3.00 | 0.00 | 0.00 | 6.00 |" in text
    assert f"`{tmp_path / 'memory_report.html'}`" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mlflow_holds_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    # A server or a data base would need more of MLflow than its client.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from lightning.pytorch.loggers import MLFlowLogger

    report = tiny_report()
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    log_report(logger, report, tmp_path)
    folder = Path(logger.experiment.get_run(logger.run_id).info.artifact_uri.removeprefix("file://"))
    assert sorted(path.name for path in folder.iterdir()) == ["memory_report.html", "memory_report.json"]
    assert MemoryReport.load(folder / "memory_report.json") == report
    assert (folder / "memory_report.html").read_text(encoding="utf-8") == render_html(report)


@pytest.mark.slow
def test_a_run_that_is_ended_by_a_signal_has_its_summary(wandb_folder: Path) -> None:
    folder = wandb_folder / "run"
    options = (
        *(*TINY, "--trainer.callbacks=null", "--trainer.logger=WandbLogger", f"--run-dir={folder}"),
        "--trainer.callbacks+=lightning_memtrain.MemoryProfiler",
        *("--trainer.callbacks+=tests.helpers.cli.InterruptAt", "--trainer.callbacks.batch=3"),
        "--trainer.callbacks.name=SIGTERM",
    )
    ended = memtrain("run", *options, cwd=wandb_folder)
    assert ended.returncode == 143, ended.stderr
    (folder / "wandb" / "latest-run").unlink()
    log = read_wandb_log(folder / "wandb")
    report = MemoryReport.load(folder / "memory" / "memory_report.json")
    assert max(log.series("trainer/global_step")) == 3
    watched = [step.peak_bytes / MIB for step in report.steps if step.stage == "fit" and step.ledger]
    assert log.series("memory/peak_mib") == pytest.approx(watched)
    assert log.summary["memory/peak_mib"] == pytest.approx(watched[-1])
