"""The folder of a run."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest
import torch

from lightning_memtrain.cli.checkpoint_file import read_checkpoint, trust
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


def flip_a_byte(path: Path) -> None:
    """In the numbers of a tensor, which torch loads as they are."""
    data = bytearray(path.read_bytes())
    place = bytes(data).index(torch.ones(3).numpy().tobytes()) + 4
    data[place] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path)["state_dict"]["x"], torch.ones(3))


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "hardly begun": lambda path: path.write_bytes(b"PK\x03\x04 cut off"),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flip_a_byte,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_taken_in_the_place_of_a_damaged_one(damage, tmp_path, capsys):
    folder = RunFolder(tmp_path)
    save(folder.checkpoints / "first.ckpt", 5, age_s=9)
    save(folder.checkpoints / "second.ckpt", 7, age_s=6)
    save(folder.checkpoints / "third.ckpt", 9, age_s=3)
    assert folder.last_checkpoint() == (folder.checkpoints / "third.ckpt", 9)
    assert capsys.readouterr().err == ""
    DAMAGE[damage](folder.checkpoints / "third.ckpt")
    assert folder.last_checkpoint() == (folder.checkpoints / "second.ckpt", 7)
    said = capsys.readouterr().err
    assert re.match(r"memtrain: `.*third.ckpt` .*damaged.* Going on from `.*second.ckpt`, 7 steps\n$", said)


@pytest.mark.parametrize("damage", DAMAGE)
def test_where_no_checkpoint_is_whole_the_reason_is_said(damage, tmp_path):
    folder = RunFolder(tmp_path)
    save(folder.checkpoints / "a.ckpt", 5, age_s=0)
    DAMAGE[damage](folder.checkpoints / "a.ckpt")
    with pytest.raises(CommandError, match=r"no whole checkpoint in .* to resume from. `.*a.ckpt` .*damaged"):
        folder.last_checkpoint()


class Custom:
    """An object of a user's class."""


class Named:
    """Names a function that does nothing to be called when it is loaded."""

    def __reduce__(self):
        return record, (1,)


calls: list[int] = []


def record(number: int) -> None:
    calls.append(number)


def test_a_checkpoint_with_objects_of_a_users_class_is_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    file = folder.checkpoints / "a.ckpt"
    content = {"global_step": 3, "hyper_parameters": {"out": Path("x"), "one": Custom()}}
    torch.save(content, file)
    with pytest.raises(CommandError) as info:
        folder.last_checkpoint()
    name = f"{__name__}.Custom"
    assert info.value.exit_code == 1
    assert str(info.value) == (
        f"`{file}` is whole, but has objects of `{name}` among its values, as from `save_hyperparameters`, "
        "and nothing that a checkpoint names is imported or called unless you name it, too. If you trust the "
        f"file, resume with --trust {name}, or call `torch.serialization.add_safe_globals([Custom])` in the "
        "module of your model. New checkpoints are without them by "
        '`self.save_hyperparameters(ignore=["name_of_the_argument"])`.'
    )
    with torch.serialization.safe_globals([Custom]):
        assert folder.last_checkpoint() == (file, 3)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_that_a_checkpoint_names_is_called(tmp_path, zipped):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    content = {"global_step": 3, "hyper_parameters": {"one": Named()}}
    torch.save(content, folder.checkpoints / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CommandError, match=rf"is whole, but has objects of `{__name__}\.record` among"):
        folder.last_checkpoint()
    assert calls == []
    torch.load(folder.checkpoints / "a.ckpt", weights_only=False)
    assert calls.pop() == 1, "the file calls nothing whoever loads it"


def test_paths_and_namespaces_are_harmless(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    values = {"path": Path("x"), "args": argparse.Namespace(lr=0.1)}
    torch.save({"global_step": 3, "hyper_parameters": values}, folder.checkpoints / "a.ckpt")
    assert read_checkpoint(folder.checkpoints / "a.ckpt")["hyper_parameters"] == values


def test_a_checkpoint_of_the_old_format_and_a_sharded_one(tmp_path):
    folder = RunFolder(tmp_path)
    sharded = folder.checkpoints / "b.ckpt"
    sharded.mkdir(parents=True)
    torch.save({"global_step": 3}, folder.checkpoints / "a.ckpt", _use_new_zipfile_serialization=False)
    assert read_checkpoint(folder.checkpoints / "a.ckpt") == {"global_step": 3}
    torch.save({"global_step": 5}, sharded / "meta.pt")
    assert folder.last_checkpoint() == (sharded, 5)


def test_what_is_whole_but_no_checkpoint_is_not_to_be_deleted(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    torch.save({"weight": torch.ones(2)}, folder.checkpoints / "a.ckpt")
    with pytest.raises(CommandError, match=r"it has no `global_step`.* move it to another folder\.$"):
        folder.last_checkpoint()
    (folder.checkpoints / "a.ckpt").unlink()
    (folder.checkpoints / "a.ckpt").mkdir()  # sharded by another strategy, or in the middle of being written
    with pytest.raises(CommandError, match=r"cannot be read as a checkpoint: .*No such file.*meta\.pt'\.$"):
        folder.last_checkpoint()
    (folder.checkpoints / "a.ckpt").rmdir()
    torch.save({"global_step": 3, "x": (2,) * 300}, folder.checkpoints / "a.ckpt", pickle_protocol=4)
    with pytest.raises(CommandError, match=r"is whole, but cannot be read as a checkpoint of tensors and"):
        folder.last_checkpoint()


@pytest.mark.parametrize("name", ["Cfg", "nowhere.Cfg", "pathlib.Cfg"])
def test_only_classes_can_be_trusted(name):
    with pytest.raises(CommandError, match=rf"`--trust {name}` must be a class with its module, but "):
        trust([name])


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("epoch,loss,step\n0,2.5,0\n0,,1\n0,1.5,2\n")
    folder.drop_metrics_from(2)
    assert folder.metrics.read_text().splitlines() == ["epoch,loss,step", "0,2.5,0", "0,,1"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


WHOLE = "epoch,loss,step\n0,2.5,0\n0,1.5,1\n"
TORN = {
    "last row": WHOLE + "0,1.",
    "row in the middle": "epoch,loss,step\n0,2.5,0\n0,1.\n0,1.5,1\n",
    "zeros of a file that was not written to its end": WHOLE + "\0" * 40,
    "bytes that are no text": WHOLE.encode() + b"0,\xff\xfe,x\n",
    "rows that have run together": WHOLE + "0,1.0,20,3.0,3\n",
}


@pytest.mark.parametrize("kind", TORN)
def test_torn_rows_of_metrics_are_left_out(kind, tmp_path, capsys):
    folder, text = RunFolder(tmp_path), TORN[kind]
    folder.metrics.write_bytes(text if isinstance(text, bytes) else text.encode())
    folder.drop_metrics_from(9)
    assert folder.metrics.read_text() == WHOLE
    expected = (
        "" if kind.startswith("zeros") else f"memtrain: 1 torn rows of `{folder.metrics}` are left out\n"
    )
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("text", ["", "epo", "0,2.5,0\n0,1.5,1\n"])
def test_metrics_without_a_header_are_put_aside(text, tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(text)
    folder.drop_metrics_from(2)
    assert not folder.metrics.exists()
    assert (tmp_path / "metrics.csv.damaged").read_text() == text
    assert "had no header; it is now `" in capsys.readouterr().err


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
