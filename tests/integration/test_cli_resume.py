"""A run that Ctrl-C stopped and `--resume` went on with equals one that was never stopped."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_memtrain.cli import main
from lightning_memtrain.cli.training.atomic_checkpoint import AtomicCheckpointIO
from lightning_memtrain.cli.training.interrupt import StopOnInterrupt
from tests.helpers.cli import IGNORED, TINY

pytestmark = pytest.mark.filterwarnings(*IGNORED)

# Dropout, so that random numbers matter.
OPTIONS = (
    *TINY,
    "--model.dropout=0.3",
    "--trainer.callbacks=null",
)


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """Shells start what they put into the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(folder: Path, *options: str) -> int:
    return main(["run", *OPTIONS, f"--run-dir={folder}", *options])


def interrupt_at(batch: int, times: int = 1, name: str = "SIGINT") -> tuple[str, ...]:
    return (
        "--trainer.callbacks+=tests.helpers.cli.InterruptAt",
        f"--trainer.callbacks.batch={batch}",
        f"--trainer.callbacks.times={times}",
        f"--trainer.callbacks.name={name}",
    )


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def final_state(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("checkpoints/epoch=1-*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    # ModelCheckpoint's own state holds paths, which differ.
    checkpoint["callbacks"] = {"RandomState": checkpoint["callbacks"]["RandomState"]}
    return checkpoint


KINDS = {
    "plain": (),
    "two batches a step": ("--trainer.accumulate_grad_batches=2",),
    "validation in mid-epoch": ("--trainer.val_check_interval=3",),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, Path]:
    """Runs that were never stopped."""
    folders = {kind: tmp_path_factory.mktemp("straight") / "run" for kind in KINDS}
    for kind, folder in folders.items():
        assert run(folder, *KINDS[kind]) == 0
    return folders


@pytest.mark.parametrize(
    ("kind", "batch", "steps"),
    [
        pytest.param("plain", 1, 2, id="mid-epoch"),
        pytest.param("plain", 5, 7, id="last batch of an epoch, so validation and one more step"),
        pytest.param("plain", 8, 9, id="second epoch"),
        pytest.param("two batches a step", 2, 2, id="first batch of a step"),
        pytest.param("two batches a step", 5, 4, id="last step of an epoch, so validation and one more"),
        pytest.param("validation in mid-epoch", 2, 4, id="before a validation, so one more step"),
    ],
)
def test_resumed_equals_uninterrupted(straight, tmp_path, capfd, kind, batch, steps):
    folder = tmp_path / "run"

    code = run(folder, *KINDS[kind], *interrupt_at(batch))

    assert code == 130
    errors = capfd.readouterr().err
    assert "memtrain: stopping after this step with a checkpoint; Ctrl-C again stops at once" in errors
    assert f"memtrain: stopped after {steps} steps; go on with: memtrain run --resume {folder}" in errors
    saved = torch.load(folder / "checkpoints" / "interrupted.ckpt", weights_only=True)
    assert saved["global_step"] == steps

    # The callback that sent Ctrl-C sits in the saved configuration; its batch is over.
    assert main(["run", "--resume", str(folder)]) == 0

    assert_same(final_state(folder), final_state(straight[kind]))
    assert (folder / "metrics.csv").read_text() == (straight[kind] / "metrics.csv").read_text()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_signals_that_end_a_process_end_a_run_as_well(straight, name, code, tmp_path, capfd):
    folder, before = tmp_path / "run", {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    profiled = ("--trainer.callbacks+=lightning_memtrain.MemoryProfiler",)
    assert run(folder, *profiled, *interrupt_at(1, name=name)) == code
    errors = capfd.readouterr().err
    said = f"memtrain: stopping after this step with a checkpoint; another {name} stops at once"
    assert said in errors
    assert f"memtrain: stopped after 2 steps; go on with: memtrain run --resume {folder}" in errors
    assert (folder / "memory" / "memory_report.json").is_file()
    assert {one: signal.getsignal(one) for one in before} == before
    assert main(["run", "--resume", str(folder)]) == 0
    assert_same(final_state(folder)["state_dict"], final_state(straight["plain"])["state_dict"])


def test_a_process_that_inherits_the_handler_is_ended_by_what_is_sent_to_it(tmp_path):
    stop = StopOnInterrupt(tmp_path / "interrupted.ckpt")
    with stop.listening(SimpleNamespace(callbacks=[stop])):
        ready, begun = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(begun, b".")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert (stop.requested, stop.exit_code) == (False, 0)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_second_interrupt_stops_at_once(name, code, tmp_path, capfd):
    folder = tmp_path / "run"
    assert run(folder, *interrupt_at(1, times=2, name=name)) == code
    errors = capfd.readouterr().err
    assert "memtrain: stopped at once, without a checkpoint" in errors
    assert not (folder / "checkpoints" / "interrupted.ckpt").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupt_without_checkpointing_stops_at_once(name, code, tmp_path, capfd):
    folder = tmp_path / "run"
    assert run(folder, "--trainer.enable_checkpointing=false", *interrupt_at(1, name=name)) == code
    assert "memtrain: stopped at once, without a checkpoint" in capfd.readouterr().err
    assert not (folder / "checkpoints").exists()


def test_interrupt_in_the_last_step_lets_the_run_end(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, *interrupt_at(11)) == 130
    (path,) = folder.glob("checkpoints/epoch=1-*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 12


def test_resume_takes_overrides_and_keeps_them(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, *interrupt_at(1)) == 130
    assert main(["run", "--resume", str(folder), "--trainer.max_epochs=1"]) == 0
    assert re.search(r"^  max_epochs: 1$", (folder / "config.yaml").read_text(), re.MULTILINE)
    steps = [int(line.split(",")[1]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert sorted(set(steps)) == [0, 1, 2, 3, 4, 5]


def test_a_moved_run_can_be_resumed(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, *interrupt_at(1)) == 130
    moved = tmp_path / "moved"
    folder.rename(moved)
    # Lightning's, about which checkpoints were the best.
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        assert main(["run", "--resume", str(moved)]) == 0
    assert not folder.exists()
    assert final_state(moved)["global_step"] == 12


class FullAt(Callback):
    """Lets the disk be full from a step on, for checkpoints."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.strategy.checkpoint_io.__class__ = OnFullDisk


class OnFullDisk(AtomicCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            super().save_checkpoint(checkpoint, path, storage_options)
        except OSError as error:  # which the system tells from a full disk by its number alone
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), error.filename) from None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_is_said_in_one_line_and_leaves_no_torn_file(straight, tmp_path, capfd):
    folder = tmp_path / "run"
    full = ("--trainer.callbacks+=tests.integration.test_cli_resume.FullAt", "--trainer.callbacks.step=9")
    keep = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1")
    assert run(folder, *keep, *full) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("memtrain: error: there is no room left to write `")
    assert last.endswith(f"go on with: memtrain run --resume {folder}")
    (whole,) = (folder / "checkpoints").iterdir()
    assert torch.load(whole, weights_only=True)["global_step"] == 6
