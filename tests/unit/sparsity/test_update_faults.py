"""An update of several layers that a fault has ended is finished later, as if there had been none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

import lightning_memtrain as mt
from lightning_memtrain.sparsity import unfinished_update
from lightning_memtrain.sparsity.methods.rules.layer_updates import UpdateTime
from lightning_memtrain.sparsity.pattern_updater import PatternUpdater
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight
from lightning_memtrain.sparsity.unfinished_update import UnfinishedUpdate, UpdateResult
from tests.helpers.faults import FailAtOp
from tests.helpers.trainers import LIGHTNING_WARNINGS
from tests.unit.sparsity.storage.test_replace_faults import InterruptAtLine, are_equal, tensors_of
from tests.unit.sparsity.test_sparse_training import EVERY_TWO, METHODS, assert_same, fit

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

NOW = UpdateTime(step=1, elapsed=5, total=10)
MOVING: dict[str, Callable[[], Any]] = {name: METHODS[name] for name in ("SET", "RigL", "DSR", "GMP, global")}


class Run:
    """A student of two layers and its teacher, whose first layer is a copy, before an update."""

    def __init__(self, name: str, storage: Any = "auto") -> None:
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        numels = {"0.weight": 128, "2.weight": 128}
        positions = {key: torch.randperm(numel)[:60].sort().values for key, numel in numels.items()}
        self.weights = mt.sparsify_(self.student, positions, storage=storage)
        teacher = copy.deepcopy(self.student[0])
        self.follower = SparseWeight("teacher.weight", teacher)
        self.updater = PatternUpdater(self.weights, MOVING[name]())
        self.updater.followers = {"0.weight": [self.follower]}
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.05)
        self.updater.watch(NOW)
        self.student(torch.randn(4, 8)).square().sum().backward()
        self.updater.record_gradients()
        self.optimizer.step()

    @property
    def everything(self) -> dict[str, SparseWeight]:
        return {**self.weights, "teacher": self.follower}

    def layers(self) -> list[list[Any]]:
        """All that belongs together, by layer."""
        return [tensors_of(one.layer, one, self.optimizer) for one in self.everything.values()]

    def update(self) -> UpdateResult:
        return self.updater.update(NOW, [self.optimizer])


def every_fault(name: str, make: Callable[[int], Any], error: type[BaseException]) -> list[int]:
    """Update with a fault at one place after another, and finish it; how many layers had moved by then."""
    run, whole = Run(name), Run(name)
    before, moved = run.layers(), whole.update()
    after, state = whole.layers(), whole.updater.state
    assert not any(are_equal(one, other) for one, other in zip(before, after, strict=True))
    num_moved: list[int] = []
    while True:
        fault = make(len(num_moved))
        try:
            with fault:
                run.update()
        except error:
            now = run.layers()
            has_moved = [are_equal(*pair) for pair in zip(now, after, strict=True)]
            stayed = [are_equal(*pair) for pair in zip(now, before, strict=True)]
            assert all(m or s for m, s in zip(has_moved, stayed, strict=True)), f"place {len(num_moved)}"
            num_moved.append(sum(has_moved))
            if all(has_moved):
                run = Run(name)
                continue
            if any(has_moved):
                assert run.update() == moved
                assert all(are_equal(*pair) for pair in zip(run.layers(), after, strict=True))
                assert run.updater.state == state
                assert run.updater.unfinished is None
                run = Run(name)
            else:  # a run whose layers have not moved can be used again, whether changes are known or not
                run.updater.unfinished = None
            continue
        return num_moved


@pytest.mark.parametrize("name", MOVING)
def test_out_of_memory_at_any_operator_of_an_update(name: str) -> None:
    num_moved = every_fault(name, FailAtOp, torch.OutOfMemoryError)
    assert set(num_moved) == {0, 1, 2}
    assert num_moved == sorted(num_moved)


def test_an_interrupt_at_any_line_of_an_update() -> None:
    num_moved = every_fault("DSR", InterruptAtLine, KeyboardInterrupt)
    assert set(num_moved) == {0, 1, 2, 3}
    assert num_moved == sorted(num_moved)


def interrupt_after_one_layer(run: Run, monkeypatch: pytest.MonkeyPatch) -> UnfinishedUpdate:
    """What is left to do."""
    assign_all = unfinished_update.assign_all

    def and_then_interrupt(exchange: Any) -> None:
        assign_all(exchange)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unfinished_update, "assign_all", and_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.update()
    assert run.updater.unfinished is not None
    return run.updater.unfinished


def test_an_interrupt_between_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    run, whole = Run("SET"), Run("SET")
    moved = whole.update()
    assert [*interrupt_after_one_layer(run, monkeypatch).changes] == ["teacher", "2.weight"]
    assert run.update() == moved
    assert all(are_equal(*pair) for pair in zip(run.layers(), whole.layers(), strict=True))


def test_what_is_left_goes_through_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, whole = Run("DSR"), Run("DSR")
    moved = whole.update()
    torch.save(interrupt_after_one_layer(run, monkeypatch).state_dict(), tmp_path / "left.pt")
    other = PatternUpdater(run.weights, MOVING["DSR"]())
    other.unfinished = UnfinishedUpdate.loaded(torch.load(tmp_path / "left.pt", weights_only=True))
    assert other.finish(run.everything, [run.optimizer]) == moved
    assert other.state == whole.updater.state
    assert all(are_equal(*pair) for pair in zip(run.layers(), whole.layers(), strict=True))
    assert UnfinishedUpdate.loaded(None) is None


def fail_after(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many layers move, and the next one run out of memory."""
    inner, calls = SparseWeight.prepare_replace, []

    def prepared(weight: SparseWeight, kept: Any, grown: Any, optimizers: list[Optimizer]) -> Any:
        calls.append(weight.name)
        if len(calls) == num_layers + 1:
            raise torch.OutOfMemoryError("injected")
        return inner(weight, kept, grown, optimizers)

    monkeypatch.setattr(SparseWeight, "prepare_replace", prepared)


class SavesAtTheFault(Callback):
    """As `ModelCheckpoint(save_on_exception=True)` of later versions of Lightning."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "fault.ckpt")


@pytest.mark.skipif(
    tuple(int(part) for part in lightning.__version__.split(".")[:2]) < (2, 6),
    reason="Lightning 2.4 goes on elsewhere from a checkpoint that an exception has saved at a batch's end",
)
@pytest.mark.parametrize("name", MOVING)
def test_a_run_that_ran_out_of_memory_in_an_update_is_resumed_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def callback() -> Any:
        return mt.SparseTraining(METHODS[name](), EVERY_TWO)

    one = callback()
    whole, trainer = fit(tmp_path, one)
    path = tmp_path / "fault.ckpt"
    with monkeypatch.context() as patch:
        # In the third update, at the end of an epoch; the smallest layer takes no part in some methods.
        fail_after(7 if name == "GMP, global" else 5, patch)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            fit(tmp_path, callback(), None, SavesAtTheFault())
    left = torch.load(path, weights_only=False)["callbacks"][callback().state_key]["unfinished"]
    assert len(left["changes"]) in (1, 2)
    two = callback()
    resumed, resumed_trainer = fit(tmp_path, two, ckpt_path=path)
    assert_same(whole, resumed)
    for key, value in trainer.optimizers[0].state_dict()["state"].items():
        for field, tensor in value.items():
            assert torch.equal(tensor, resumed_trainer.optimizers[0].state_dict()["state"][key][field])
    assert one.technique_record().settings == two.technique_record().settings
    assert two.state_dict()["unfinished"] is None
