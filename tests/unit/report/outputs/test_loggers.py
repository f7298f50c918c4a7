from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_memtrain.core import Category, ReportWarning, TechniqueRecord
from lightning_memtrain.report.outputs.html import render_html
from lightning_memtrain.report.outputs.loggers import define_metrics, log_report, log_scalars
from tests.helpers.reports import deep_report, tiny_report


class Recorder:
    """Stands for an experiment; notes every call as (method, positional, keyword)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((method, args, kwargs))


class FakeLogger:
    """A logger of no known kind."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.scalars: list[tuple[dict[str, float], int | None]] = []
        self.run_id = "run-7"

    @property
    def name(self) -> str:
        return "fake"

    @property
    def version(self) -> str:
        return "0"

    @property
    @rank_zero_experiment
    def experiment(self) -> Recorder:
        return self.recorder

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.scalars.append((metrics, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the report has no hyperparameters")


class WandbLogger(FakeLogger):
    """Known by its name alone, as the logger of `pytorch_lightning` is."""


class TensorBoardLogger(FakeLogger): ...


class MLFlowLogger(FakeLogger): ...


class BrokenLogger(FakeLogger):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("server is down")


class BrokenTensorBoardLogger(TensorBoardLogger):
    """A subclass of a known logger, which is treated like it."""

    @property
    def experiment(self) -> Recorder:
        raise PermissionError("read-only file system")


def fake_trainer(*loggers: Logger, step: int = 41) -> Any:
    epoch_loop = SimpleNamespace(_batches_that_stepped=step)
    return SimpleNamespace(loggers=list(loggers), fit_loop=SimpleNamespace(epoch_loop=epoch_loop))


def test_scalars_go_to_every_logger_at_lightnings_step() -> None:
    first, second = FakeLogger(), WandbLogger()
    log_scalars(fake_trainer(first, second), {"memory/peak_mib": 1.5})
    assert first.scalars == second.scalars == [({"memory/peak_mib": 1.5}, 41)]


def test_no_logger_is_no_error() -> None:
    log_scalars(fake_trainer(), {"memory/peak_mib": 1.5})


def test_a_failing_logger_warns_and_the_next_one_still_gets_its_scalars() -> None:
    broken, sound = BrokenLogger(), FakeLogger()
    with pytest.warns(
        ReportWarning,
        match=r"BrokenLogger could not log the memory report: ConnectionError: server is down\. Training",
    ):
        log_scalars(fake_trainer(broken, sound), {"memory/peak_mib": 1.5})
    assert len(sound.scalars) == 1


def test_a_failing_experiment_warns(tmp_path: Path) -> None:
    with pytest.warns(
        ReportWarning, match="BrokenTensorBoardLogger .* PermissionError: read-only file system"
    ):
        log_report(BrokenTensorBoardLogger(), tiny_report(), tmp_path)


def test_wandb_that_is_not_installed_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(ReportWarning, match="WandbLogger could not log the memory report: .*wandb"):
        log_report(WandbLogger(), tiny_report(), tmp_path)


def test_lightning_itself_refuses_a_wandb_logger_without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import wandb as module

    class Missing:
        def __bool__(self) -> bool:
            return False

        def __str__(self) -> str:
            return "Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`"

    monkeypatch.setattr(module, "_WANDB_AVAILABLE", Missing())
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        module.WandbLogger(project="p", offline=True)


def test_only_wandb_is_given_axes() -> None:
    for logger in (FakeLogger(), TensorBoardLogger(), MLFlowLogger()):
        define_metrics(logger, log_all=True)
        assert logger.recorder.calls == []
    logger = WandbLogger()
    define_metrics(logger)
    assert logger.recorder.calls == []  # nor W&B, unless it gets these series
    define_metrics(logger, log_all=True)
    axis, *series = logger.recorder.calls
    assert axis == ("define_metric", ("memtrain/event",), {"hidden": True, "summary": "none"})
    assert len(series) == 4 * len(Category)  # all but workspace, and the total
    assert {call[1][0] for call in series} >= {
        "memory_timeline/total_mib",
        "memory_timeline/predict/inputs_mib",
    }
    options = {"step_metric": "memtrain/event", "step_sync": False, "summary": "none"}
    assert all(call[2] == options for call in series)


def test_tensorboard_gets_a_text_per_stage(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    log_report(logger, tiny_report(), tmp_path)
    assert [(method, args[0]) for method, args, _ in logger.recorder.calls] == [
        ("add_text", "memory_report/fit"),
        ("add_text", "memory_report/validate"),
    ]
    text = logger.recorder.calls[1][1][1]
    assert "validate: peak 50.00 MiB** (ledger)" in text
    assert text.endswith(f"`{tmp_path / 'memory_report.html'}`")


def test_tensorboard_text_lists_twenty_modules_and_no_folder_that_was_not_written() -> None:
    logger = TensorBoardLogger()
    log_report(logger, deep_report(), None)
    ((_, (_, text), _),) = logger.recorder.calls
    assert text.count("| blocks.") == 20
    assert "memory_report.html" not in text


def test_tensorboard_text_lists_the_techniques() -> None:
    logger = TensorBoardLogger()
    techniques = (TechniqueRecord("Microbatching", {"mode": "a|b"}), TechniqueRecord("RigL"))
    log_report(logger, replace(deep_report(), techniques=techniques), None)
    ((_, (_, text), _),) = logger.recorder.calls
    assert text.splitlines()[1:5] == ["", "- Microbatching(mode='a\\|b')", "- RigL()", ""]


def test_mlflow_gets_both_files(tmp_path: Path) -> None:
    logger, report = MLFlowLogger(), tiny_report()
    log_report(logger, report, None)
    (json_call, html_call) = logger.recorder.calls
    assert json_call[:1] == html_call[:1] == ("log_text",)
    assert json_call[1][0] == "run-7"
    assert json.loads(json_call[1][1]) == json.loads(json.dumps(report.to_dict()))
    assert json_call[1][2] == "memory_report.json"
    assert html_call[1] == ("run-7", render_html(report), "memory_report.html")


def test_other_loggers_get_nothing_more(tmp_path: Path) -> None:
    logger = FakeLogger()
    log_report(logger, tiny_report(), tmp_path)
    assert logger.recorder.calls == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_report(CSVLogger(tmp_path), tiny_report(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_log_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = MLFlowLogger()
    log_report(logger, tiny_report(), None)
    define_metrics(WandbLogger())
    assert logger.recorder.calls == []
