from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_memtrain.core import Category, ReportWarning
from lightning_memtrain.report import MemoryProfiler, MemoryReport
from tests.helpers.boring_models import INPUT_BYTES, PARAMETER_BYTES, BoringModel
from tests.helpers.trainers import LIGHTNING_WARNINGS, assert_torch_is_as_found, fit, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


class Fails(BoringModel):
    """Raises in one training step, between forward and backward."""

    def __init__(self, error: BaseException | None, at_step: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.error = error
        self.at_step = at_step

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        hidden = self.body(batch).relu()
        loss = self.head(hidden).mean()
        if batch_idx == self.at_step:
            if self.error is not None:
                raise self.error
            torch.empty(2**60, dtype=torch.uint8)
        return loss


def _load(folder: Path) -> MemoryReport:
    return MemoryReport.load(folder / "memory" / "memory_report.json")


# ---------------------------------------------------------------------- out of memory


def test_out_of_memory_in_a_watched_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 1 GiB"
    )
    model = Fails(error, at_step=1)
    profiler = MemoryProfiler()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(model, profiler, tmp_path, limit_val_batches=0)
    assert caught.value is error
    report = _load(tmp_path)
    assert report == profiler.report
    failure = report.out_of_memory
    assert failure is not None
    assert (failure.step, failure.stage) == (1, "fit")
    assert failure.message == "CUDA out of memory. Tried to allocate 2.00 GiB."
    # The step got as far as the loss: no new gradients, but those of step 0 were not yet zeroed.
    held = report.stages["fit"].at_peak
    assert [held[c] for c in (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)] == [
        PARAMETER_BYTES
    ] * 3
    assert held[Category.INPUTS] == INPUT_BYTES
    assert failure.held_bytes == held.total_bytes
    assert len(failure.holders) == 3
    assert [holder.num_bytes for holder in failure.holders] == [PARAMETER_BYTES] * 3
    assert {holder.name for holder in failure.holders} == {"parameters", "gradients", "optimizer state"}
    assert all(holder.advice for holder in failure.holders)
    printed = capsys.readouterr().out
    assert "Out of memory in fit, step 1" in printed
    assert "3. " in printed
    assert (tmp_path / "memory" / "memory_report.html").is_file()
    assert_torch_is_as_found(model)


def test_an_allocation_that_the_cpu_refuses(tmp_path: Path):
    model = Fails(None, at_step=0)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        fit(model, MemoryProfiler(), tmp_path, limit_val_batches=0)
    failure = _load(tmp_path).out_of_memory
    assert failure is not None
    assert "DefaultCPUAllocator: can't allocate memory" in failure.message
    assert failure.holders[0].name == "parameters"
    assert failure.holders[0].num_bytes == PARAMETER_BYTES
    assert_torch_is_as_found(model)


def test_out_of_memory_in_a_step_without_the_ledger(tmp_path: Path):
    model = Fails(torch.OutOfMemoryError("out"), at_step=4)
    profiler = MemoryProfiler(every_n_steps=100)
    with pytest.raises(torch.OutOfMemoryError):
        fit(model, profiler, tmp_path, limit_val_batches=0)
    failure = _load(tmp_path).out_of_memory
    assert failure is not None
    assert failure.step == 4
    assert (
        failure.message == "out (The ledger did not watch this step; the holders are those of step 2 of fit.)"
    )
    assert failure.held_bytes == profiler.breakdowns["fit"].peak_bytes
    assert len(failure.holders) == 3


def test_out_of_memory_in_backward_and_in_validation(tmp_path: Path):
    class InBackward(BoringModel):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            loss = self.loss(batch)
            loss.register_hook(self.fail)
            return loss

        def fail(self, gradient: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("in backward")

    class InValidation(BoringModel):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            raise torch.OutOfMemoryError("in validation")

    for model, stage in ((InBackward(), "fit"), (InValidation(), "validate")):
        profiler = MemoryProfiler()
        with pytest.raises(torch.OutOfMemoryError):
            fit(model, profiler, tmp_path, num_sanity_val_steps=0)
        failure = _load(tmp_path).out_of_memory
        assert failure is not None
        assert (failure.stage, failure.step) == (stage, 0)
        assert_torch_is_as_found(model)


def test_another_rank_writes_its_own_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = Fails(torch.OutOfMemoryError("on rank 3"), at_step=1)
    trainer = quiet_trainer(tmp_path, MemoryProfiler(), limit_val_batches=0)
    monkeypatch.setattr(type(trainer.strategy), "is_global_zero", False)
    monkeypatch.setattr(type(trainer.strategy), "global_rank", 3, raising=False)
    monkeypatch.setattr(type(trainer), "global_rank", 3)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(model)
    assert not (tmp_path / "memory" / "memory_report.json").exists()
    report = MemoryReport.load(tmp_path / "memory" / "rank_3" / "memory_report.json")
    assert report.out_of_memory is not None
    assert report.out_of_memory.message == "on rank 3"


# ---------------------------------------------------------------------- other exceptions


@pytest.mark.parametrize("at_step", [0, 1, 4])
def test_any_exception_leaves_a_report_and_torch_as_found(at_step: int, tmp_path: Path):
    error = ValueError("a label is wrong")
    model = Fails(error, at_step=at_step)
    with pytest.raises(ValueError, match="a label is wrong"):
        fit(model, MemoryProfiler(every_n_steps=100), tmp_path, limit_val_batches=0)
    report = _load(tmp_path)
    assert report.out_of_memory is None
    assert [step.step for step in report.steps] == list(range(min(at_step, 2) + 1))
    assert report.growth["fit"] == ()
    assert_torch_is_as_found(model)


def test_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = Fails(KeyboardInterrupt(), at_step=1)
    with pytest.raises(SystemExit):
        fit(model, MemoryProfiler(), tmp_path, limit_val_batches=0)
    assert [step.step for step in _load(tmp_path).steps] == [0, 1]
    assert "Memory report" in capsys.readouterr().out
    assert_torch_is_as_found(model)


def test_a_failure_of_the_profiler_does_not_hide_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("in the report")

    monkeypatch.setattr("lightning_memtrain.report.outputs.run_telling.publish_report", broken)
    model = Fails(ValueError("the reason"), at_step=1)
    with (
        pytest.warns(ReportWarning, match="could not report on the step that failed: ZeroDivisionError"),
        pytest.raises(ValueError, match="the reason"),
    ):
        fit(model, MemoryProfiler(), tmp_path, limit_val_batches=0)
    assert_torch_is_as_found(model)


def test_a_failure_before_the_run_has_nothing_to_report(tmp_path: Path):
    class FailsEarly(BoringModel):
        def setup(self, stage: str) -> None:
            raise ValueError("no data")

    profiler = MemoryProfiler()
    with pytest.raises(ValueError, match="no data"):
        fit(FailsEarly(), profiler, tmp_path)
    assert profiler.report is None
    assert not (tmp_path / "memory").exists()


def test_a_test_that_fails_early_leaves_the_report_of_the_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class TestsNothing(BoringModel):
        def setup(self, stage: str) -> None:
            if stage == "test":
                raise ValueError("no data")

    profiler = MemoryProfiler()
    model = TestsNothing(num_batches=2)
    trainer = fit(model, profiler, tmp_path)
    fitted = profiler.report
    capsys.readouterr()
    with pytest.raises(ValueError, match="no data"):
        trainer.test(model)
    assert profiler.report is fitted
    assert _load(tmp_path) == fitted
    assert "Memory report" not in capsys.readouterr().out


def test_the_callback_works_again_after_a_failure(tmp_path: Path):
    profiler = MemoryProfiler()
    with pytest.raises(torch.OutOfMemoryError):
        fit(Fails(torch.OutOfMemoryError("once"), at_step=0), profiler, tmp_path, limit_val_batches=0)
    fit(BoringModel(num_batches=2), profiler, tmp_path)
    report = _load(tmp_path)
    assert report.out_of_memory is None
    assert report.model == "BoringModel"
    assert [step.step for step in report.steps if step.stage == "fit"] == [0, 1]


# ---------------------------------------------------------------------- models that cannot be profiled


class NoParameters(LightningModule):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        raise AssertionError("refused before the first step")

    validation_step = test_step = predict_step = forward = training_step

    def configure_optimizers(self) -> None:
        return None

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = BoringModel().test_dataloader


class TwoDevices(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.elsewhere = nn.Linear(2, 2, device="meta")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        raise AssertionError("refused before the first step")


RUNS = ["fit", "validate", "test", "predict"]


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("run", RUNS)
def test_a_model_without_parameters_is_refused_at_the_start(run: str, tmp_path: Path):
    message = (
        "`MemoryProfiler` needs a model with parameters, which decide on the device to profile, "
        "but got NoParameters with none. Make its layers in `__init__` or `configure_model`, "
        "or train it without the profiler."
    )
    trainer = quiet_trainer(tmp_path, MemoryProfiler())
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(trainer, run)(NoParameters())


@pytest.mark.parametrize("run", RUNS)
def test_parameters_on_two_devices_are_refused_at_the_start(run: str, tmp_path: Path):
    message = (
        "`MemoryProfiler` needs all parameters on one device, whose bytes it counts, "
        "but TwoDevices has body.weight on cpu, elsewhere.weight on meta. "
        "Let the trainer move the whole model to one device, or train it without the profiler."
    )
    # Lightning's own move to the device fails first on `meta`, so it is told to leave the model where it is.
    trainer = quiet_trainer(tmp_path, MemoryProfiler())
    trainer.strategy.model_to_device = trainer.strategy.teardown = lambda: None
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(trainer, run)(TwoDevices())


# ---------------------------------------------------------------------- a folder that cannot be written to


def _file_in_the_way(tmp_path: Path) -> Path:
    (tmp_path / "taken").write_text("a file")
    return tmp_path / "taken" / "report"


def _read_only(tmp_path: Path) -> Path:
    folder = tmp_path / "read_only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        _file_in_the_way,
        pytest.param(
            _read_only, marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
        ),
    ],
)
def test_an_unwritable_folder_warns_and_loses_nothing(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = make(tmp_path)
    profiler = MemoryProfiler(report_dir=folder)
    model = BoringModel(num_batches=3)
    logger = CSVLogger(tmp_path, name="logs", version="")
    message = (
        rf"`MemoryProfiler\(report_dir\)` must be a folder that can be written to, but '{folder}' cannot: "
    )
    with pytest.warns(ReportWarning, match=message):
        trainer = fit(model, profiler, tmp_path, logger=logger, log_every_n_steps=1)
    assert trainer.global_step == 3
    assert trainer.state.finished
    assert profiler.report is not None
    profiler.report.save(tmp_path / "rescued.json")
    assert MemoryReport.load(tmp_path / "rescued.json") == profiler.report
    assert "Memory report" in capsys.readouterr().out
    assert "memory/peak_mib" in (tmp_path / "logs" / "metrics.csv").read_text()
