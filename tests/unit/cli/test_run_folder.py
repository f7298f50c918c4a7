"""The folder of a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.recipes import Recipe
from lightning_memtrain.cli.run_folder import RunFolder


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMTRAIN_RUN_DIR", "")  # so that it is restored
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_new_folder_is_named_after_recipe_and_time():
    folder = RunFolder.new(None, "tiny-fast")
    assert re.fullmatch(r"runs/tiny-fast-\d{8}-\d{6}", str(folder.path))
    # It is made when the run begins, so that a mistake in the options leaves none.
    assert not folder.path.exists()


def test_two_runs_in_one_second(monkeypatch):
    first = RunFolder.new(None, "tiny").path
    for second in range(2):  # in case the clock ticks in between, the names differ anyway
        first.mkdir(parents=True, exist_ok=True)
        assert RunFolder.new(None, "tiny").path != first, second


def test_an_empty_folder_may_be_used(tmp_path):
    assert RunFolder.new(tmp_path, "tiny").path == tmp_path


def test_other_processes_of_a_run_use_the_first_ones_folder(monkeypatch):
    first = RunFolder.new(None, "tiny")
    first.path.mkdir(parents=True)
    (first.path / "config.yaml").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert RunFolder.new(None, "tiny") == first
    assert RunFolder.new(first.path, "tiny") == first  # though it holds something


def save(path: Path, global_step: int, age_s: int) -> None:
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": global_step, "state_dict": {"x": torch.ones(3)}}, path)
    os.utime(path, (1_000_000 - age_s,) * 2)


def test_last_checkpoint_is_the_one_with_most_steps(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder.checkpoints / "epoch=0-step=5.ckpt", 5, age_s=0)
    save(folder.checkpoints / "epoch=1-step=10.ckpt", 10, age_s=3)
    save(folder.interrupt_checkpoint, 10, age_s=2)
    assert folder.last_checkpoint() == (folder.interrupt_checkpoint, 10)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CommandError, match=r"no checkpoint in `.*checkpoints` to resume from") as info:
        RunFolder(tmp_path).last_checkpoint()
    assert info.value.exit_code == 1


def test_damaged_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder.checkpoints / "good.ckpt", 5, age_s=0)
    (folder.checkpoints / "bad.ckpt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CommandError, match=r"bad.ckpt` cannot be read .* delete it to resume"):
        folder.last_checkpoint()


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("epoch,loss,step\n0,2.5,0\n0,,1\n0,1.5,2\n")
    folder.drop_metrics_from(2)
    assert folder.metrics.read_text().splitlines() == ["epoch,loss,step", "0,2.5,0", "0,,1"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_no_metrics_to_drop(tmp_path):
    RunFolder(tmp_path).drop_metrics_from(2)
    assert list(tmp_path.iterdir()) == []


def test_code_of_a_users_recipe_is_kept(tmp_path):
    mine = tmp_path / "mine"
    (mine / "variants").mkdir(parents=True)
    for name in ("config.yaml", "variants/fast.yaml", "model.py", "photo.png"):
        (mine / name).write_text(name)
    # The run may lie in the recipe's own folder.
    folder = RunFolder(mine / "runs" / "a")
    folder.keep_code(Recipe("mine", mine))
    folder.keep_code(Recipe("mine", mine))
    kept = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert kept == {"recipe/mine/config.yaml", "recipe/mine/variants/fast.yaml", "recipe/mine/model.py"}
    assert folder.kept_recipe() == Recipe("mine", folder.path / "recipe" / "mine")
    assert RunFolder(tmp_path / "other").kept_recipe() is None


def test_earlier_runs_in_the_folder_of_a_recipe_are_not_kept(tmp_path):
    mine = tmp_path / "mine"
    # A package of the recipe may have a configuration of its own, which makes no run of it.
    code = ("config.yaml", "model.py", "parts/config.yaml", "parts/layer.py")
    for name in code:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(name)
    # One run with metrics, one that was broken off at once, and one of an installed recipe.
    for left in ("runs/a/metrics.csv", "runs/b", "elsewhere/c/checkpoints/last.ckpt"):
        folder = RunFolder(mine / "/".join(left.split("/")[:2]))
        folder.path.mkdir(parents=True)
        folder.config.write_text("trainer: {}")
        if left.startswith("runs"):
            folder.keep_code(Recipe("mine", mine))
        if left != "runs/b":
            (mine / left).parent.mkdir(exist_ok=True)
            (mine / left).touch()
    folder = RunFolder(mine / "runs" / "d")
    folder.keep_code(Recipe("mine", mine))
    for run in (folder, RunFolder(mine / "runs" / "b")):
        kept = {str(path.relative_to(run.code)) for path in run.code.rglob("*") if path.is_file()}
        assert kept == {f"mine/{name}" for name in code}
    # What was kept is a recipe as well, though it lies in the folder of a run.
    again = RunFolder(mine / "runs" / "e")
    again.keep_code(Recipe("mine", folder.code / "mine"))
    kept = {str(path.relative_to(again.path)) for path in again.path.rglob("*") if path.is_file()}
    assert kept == {f"recipe/mine/{name}" for name in code}
