"""What a run's record says while it runs, at its end, and after it went on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_memtrain import MemoryProfiler, Microbatching
from lightning_memtrain.cli.training.run_record_callback import STUDY_VARIABLE, RecordRun
from lightning_memtrain.study.run_record import RunRecord
from tests.helpers.wandb_log import read_wandb_log


class Logged(BoringModel):
    """Logs a number, one that is none, and fails when it is told to."""

    fails_at = -1

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fails_at:
            raise ValueError("a bug\nof two lines")
        self.log("train/odd", math.nan)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/score", 0.5)
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.log("test/score", 0.75)
        return super().test_step(batch, batch_idx)


def trainer_with(folder: Path, *callbacks: pl.Callback, **options: object) -> pl.Trainer:
    settings = {"max_epochs": 2, "limit_train_batches": 6, "limit_val_batches": 1, "limit_test_batches": 1}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), accelerator="cpu", **settings | options
    )


def recorder(folder: Path) -> RecordRun:
    return RecordRun(folder, "net", 7)


def read(folder: Path) -> RunRecord:
    record = RunRecord.load(folder)
    assert record is not None
    return record


def test_a_finished_run(tmp_path):
    record = recorder(tmp_path)
    profiler = MemoryProfiler(report_dir=tmp_path / "memory")
    trainer = trainer_with(tmp_path, record, profiler, enable_checkpointing=False)
    model = Logged()
    trainer.fit(model)
    assert read(tmp_path).state == "trained"
    trainer.test(model, verbose=False)
    record.finish(trainer)

    written = read(tmp_path)
    assert (written.recipe, written.state, written.seed, written.num_parts) == ("net", "finished", 7, 1)
    assert (written.num_steps, written.total_steps) == (12, 12)
    assert written.num_timed_steps == 9  # the ledger watched the first three
    assert written.step_seconds is not None
    assert 0 < written.step_seconds < written.seconds
    assert {name: written.metrics[name] for name in ("val/score", "test/score")} == {
        "val/score": 0.5,
        "test/score": 0.75,
    }
    assert "train/odd" not in written.metrics
    assert not any(name.startswith("memory/") for name in written.metrics)
    highest = profiler.breakdowns["fit"]
    assert written.peak_bytes == highest.peak_bytes
    assert written.ledger_peak_bytes == highest.ledger_peak_bytes
    assert sum(written.at_peak.values()) == highest.peak_bytes
    assert written.environment["num_threads"] == str(torch.get_num_threads())


def test_gradients_of_several_batches_make_one_step(tmp_path):
    trainer = trainer_with(
        tmp_path, recorder(tmp_path), accumulate_grad_batches=4, enable_checkpointing=False
    )
    trainer.fit(Logged())
    # Batches 1 to 4, and 5 and 6 of an epoch that ends.
    assert (read(tmp_path).num_steps, read(tmp_path).total_steps, read(tmp_path).num_timed_steps) == (4, 4, 4)
    assert read(tmp_path).peak_bytes is None


def test_a_run_without_an_end_has_no_total(tmp_path):
    timer = pl.callbacks.Timer(duration={"seconds": 1})
    trainer = trainer_with(tmp_path, recorder(tmp_path), timer, max_epochs=-1, enable_checkpointing=False)
    trainer.fit(Logged())
    assert read(tmp_path).total_steps is None


def test_a_failure_says_why_in_one_line(tmp_path):
    model = Logged()
    model.fails_at = 4
    with pytest.raises(ValueError, match="a bug"):
        trainer_with(tmp_path, recorder(tmp_path), enable_checkpointing=False).fit(model)
    written = read(tmp_path)
    assert (written.state, written.reason, written.num_steps) == (
        "failed",
        "ValueError: a bug of two lines",
        4,
    )


def test_a_folder_that_cannot_be_written_to_does_not_hide_the_failure(tmp_path):
    model = Logged()
    model.fails_at = 3
    record = recorder(tmp_path)
    trainer = trainer_with(tmp_path, record, enable_checkpointing=False)
    record._path = tmp_path / "run.json"
    model.on_train_epoch_start = lambda: setattr(record, "_path", Path("/proc/nowhere/run.json"))
    with pytest.raises(ValueError, match="a bug"):
        trainer.fit(model)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_has_a_record_of_all_its_parts(tmp_path):
    def saving() -> pl.callbacks.ModelCheckpoint:
        return pl.callbacks.ModelCheckpoint(tmp_path / "kept", save_top_k=-1)

    first = trainer_with(tmp_path, recorder(tmp_path), saving(), max_epochs=1)
    first.fit(Logged())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    second = trainer_with(tmp_path, recorder(tmp_path), saving())
    second.fit(Logged(), ckpt_path=checkpoint)
    written = read(tmp_path)
    assert (written.num_parts, written.num_steps, written.num_timed_steps) == (2, 12, 12)

    # There is nothing left to train: what was known stays.
    record = recorder(tmp_path)
    third = trainer_with(tmp_path, record, saving(), max_epochs=1)
    third.fit(Logged(), ckpt_path=checkpoint)
    record.finish(third)
    written = read(tmp_path)
    assert (written.state, written.num_parts, written.total_steps) == ("finished", 2, 6)
    assert written.metrics["val/score"] == 0.5
    assert written.environment


def test_a_study_says_which_run_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv(STUDY_VARIABLE, json.dumps({"study": "mine", "variant": "half"}))
    trainer_with(tmp_path, recorder(tmp_path), max_steps=1, enable_checkpointing=False).fit(Logged())
    assert read(tmp_path).study == {"study": "mine", "variant": "half"}


def test_wandb_is_told_techniques_and_settings(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv(STUDY_VARIABLE, json.dumps({"study": "mine", "variant": "half", "strength": 2}))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    technique = Microbatching(num_microbatches=1)
    trainer_with(
        tmp_path, recorder(tmp_path), technique, max_steps=1, enable_checkpointing=False, logger=logger
    ).fit(Logged())
    logger.experiment.finish()
    told = read_wandb_log(tmp_path).config["memtrain"]
    assert (told["study"], told["variant"], told["strength"]) == ("mine", "half", 2)
    assert (told["recipe"], told["seed"]) == ("net", 7)
    assert told["techniques"]["Microbatching"]["num_microbatches"] == 1
