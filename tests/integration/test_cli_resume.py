"""A run that Ctrl-C stopped and `--resume` went on with equals one that was never stopped."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_memtrain.cli import main
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


def interrupt_at(batch: int, times: int = 1) -> tuple[str, ...]:
    return (
        "--trainer.callbacks+=tests.helpers.cli.InterruptAt",
        f"--trainer.callbacks.batch={batch}",
        f"--trainer.callbacks.times={times}",
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


def test_second_interrupt_stops_at_once(tmp_path, capfd):
    folder = tmp_path / "run"
    assert run(folder, *interrupt_at(1, times=2)) == 130
    errors = capfd.readouterr().err
    assert "memtrain: stopped at once, without a checkpoint" in errors
    assert not (folder / "checkpoints" / "interrupted.ckpt").exists()


def test_interrupt_without_checkpointing_stops_at_once(tmp_path, capfd):
    folder = tmp_path / "run"
    assert run(folder, "--trainer.enable_checkpointing=false", *interrupt_at(1)) == 130
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
