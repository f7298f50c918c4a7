"""Copies of layers, such as a teacher that follows by averaging, have the positions of their original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.sparsity.selection.layer_copies import find_layer_copies
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


def network() -> nn.Sequential:
    """First convolution and last linear layer stay dense, in a copy as well."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.Tanh(),
        nn.Linear(16, 4),
    )


class Student(LightningModule):
    """A student, and a teacher that follows it by an average of parameters in their order."""

    def __init__(self, frozen: bool = False, trains_all: bool = False) -> None:
        super().__init__()
        self.student = network()
        self.trains_all = trains_all
        self.make_teacher(frozen)

    def make_teacher(self, frozen: bool) -> None:
        self.teacher = copy.deepcopy(self.student).requires_grad_(not frozen)

    def teacher_of(self) -> nn.Module:
        return self.teacher

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher_of()(batch)
        return (self.student(batch) - target - 1).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        for slow, fast in zip(self.teacher_of().parameters(), self.student.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((self if self.trains_all else self.student).parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        rows = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(3))
        return DataLoader(rows, batch_size=4)


class CopiedLater(Student):
    """The reference: the copy is made when the student is sparse."""

    def make_teacher(self, frozen: bool) -> None:
        pass

    def on_fit_start(self) -> None:
        self.teacher = copy.deepcopy(self.student)


class InAList(Student):
    def __init__(self, frozen: bool = False) -> None:
        LightningModule.__init__(self)
        net = network()
        self.networks = nn.ModuleList([net, copy.deepcopy(net).requires_grad_(not frozen)])
        self.trains_all = False

    def __getattr__(self, name: str) -> Any:
        if name in ("student", "teacher"):
            return self.networks[("student", "teacher").index(name)]
        return super().__getattr__(name)


class LinearInAList(InAList):
    """Without convolutions no layer is an end that stays dense."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__(frozen)
        first, second = nn.Linear(16, 8), nn.Linear(8, 8)
        net = nn.Sequential(nn.Flatten(), nn.Identity(), first, nn.Tanh(), nn.ReLU(), second)
        self.networks = nn.ModuleList([net, copy.deepcopy(net).requires_grad_(not frozen)])


class TeacherFirst(Student):
    def make_teacher(self, frozen: bool) -> None:
        student = self.student
        del self.student
        self.teacher = copy.deepcopy(student).requires_grad_(not frozen)
        self.student = student


class Averaged(Student):
    """By torch's own wrapper."""

    def make_teacher(self, frozen: bool) -> None:
        self.ema = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.ema.requires_grad_(not frozen)

    def teacher_of(self) -> nn.Module:
        return self.ema.module

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.student)


METHODS: dict[str, Callable[[], Any]] = {
    "StaticSparse": lambda: mt.sparsity.StaticSparse(0.5),
    "SET": lambda: mt.sparsity.SET(0.5, drop=0.5),
    "RigL": lambda: mt.sparsity.RigL(0.5, drop=0.5),
    "DSR": lambda: mt.sparsity.DSR(0.5, threshold=0.05),
    "GMP": lambda: mt.sparsity.GradualMagnitudePruning(0.5),
}


def fit(folder: Path, method: str, model: Student, **options: Any) -> tuple[Student, Any]:
    update = None if method == "StaticSparse" else mt.sparsity.UpdateEvery(2, stop=1.0)
    callback = mt.SparseTraining(METHODS[method](), update, **options)
    quiet_trainer(folder, callback, max_epochs=1).fit(model)
    return model, callback


def made(kind: type[Student], **options: Any) -> Student:
    seed_everything(1, verbose=False)
    return kind(**options)


KINDS: dict[str, Callable[[], Student]] = {
    "frozen": lambda: made(Student, frozen=True),
    "not frozen": lambda: made(Student),
    "in the optimizer": lambda: made(Student, trains_all=True),
    "in a list, frozen": lambda: made(InAList, frozen=True),
    "in a list, not frozen": lambda: made(LinearInAList),
    "teacher first": lambda: made(TeacherFirst),
    "teacher first, frozen": lambda: made(TeacherFirst, frozen=True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_what_one_of_the_sparse_layers_would_have_been(
    kind: str, method: str, tmp_path: Path
) -> None:
    model, callback = fit(tmp_path, method, KINDS[kind]())
    student, teacher = mt.sparsity.sparse_weights(model.student), mt.sparsity.sparse_weights(model.teacher)
    assert list(student) == list(teacher) == ["2.weight", "5.weight"]
    for key, weight in student.items():
        assert torch.equal(weight.positions(), teacher[key].positions())
        assert method == "DSR" or weight.nnz == weight.numel // 2
        assert not torch.equal(weight.values, teacher[key].values)
    if "list" in kind or "first" in kind:  # patterns depend on names
        return
    expected, _ = fit(tmp_path, method, made(CopiedLater))
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert "copies share the pattern of their original: 'teacher.2' of 'student.2', 'teacher.5' of" in str(
        callback.technique_record().events
    )


@pytest.mark.parametrize("method", METHODS)
def test_torchs_averaged_model_follows(method: str, tmp_path: Path) -> None:
    model, _ = fit(tmp_path, method, made(Averaged))
    student, teacher = mt.sparsity.sparse_weights(model.student), mt.sparsity.sparse_weights(model.ema.module)
    assert list(student) == list(teacher) == ["2.weight", "5.weight"]
    for name, weight in student.items():
        assert torch.equal(weight.positions(), teacher[name].positions())
        assert not torch.equal(weight.values, teacher[name].values)


def test_a_copy_that_is_named_stays_dense(tmp_path: Path) -> None:
    class Reference(Student):
        def on_train_batch_end(self, *_: Any) -> None:
            pass

    model, callback = fit(
        tmp_path, "RigL", made(Reference, frozen=True), layers=mt.sparsity.Select(dense=["teacher.*"])
    )
    assert list(mt.sparsity.sparse_weights(model)) == ["student.2.weight", "student.5.weight"]
    assert torch.equal(model.teacher[5].weight, made(Student).student[5].weight)
    assert not any("copies" in event for event in callback.technique_record().events)


@pytest.mark.filterwarnings("ignore:`SparseTraining` reaches")
def test_a_copy_of_a_layer_that_stays_dense_does_so(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, "SET", made(Student), layers=mt.sparsity.Select(dense=["student.5"]))
    assert list(mt.sparsity.sparse_weights(model)) == ["student.2.weight", "teacher.2.weight"]


def test_a_resumed_teacher_goes_on_following(tmp_path: Path) -> None:
    def run(max_epochs: int, checkpoint: Path | None = None) -> tuple[Student, Any]:
        model = made(Student, frozen=True)
        callback = mt.SparseTraining(mt.sparsity.RigL(0.5, drop=0.5), mt.sparsity.UpdateEvery(3, stop=16))
        trainer = quiet_trainer(tmp_path, callback, max_epochs=max_epochs)
        trainer.fit(model, ckpt_path=checkpoint)
        return model, trainer

    whole, _ = run(2)
    with pytest.warns(UserWarning, match="the run ends at step 8"):
        _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(2, tmp_path / "half.ckpt")
    for (name, tensor), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_a_copy_that_nobody_could_know_is_refused(tmp_path: Path) -> None:
    message = (
        r"cannot let 'networks\.1\.0' follow 'networks\.0\.0', .* Call `requires_grad_\(False\)` on the copy"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, "RigL", made(InAList))


class Places(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def linear_paths(model: nn.Module) -> dict[str, str]:
    return dict(mt.sparsity.Select().choose(model)[1].originals)


def encoder(num_layers: int = 3) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


def test_blocks_of_one_network_are_no_copies() -> None:
    model = Places(net=encoder())
    assert torch.equal(model.net.layers[0].linear1.weight, model.net.layers[2].linear1.weight)
    assert linear_paths(model) == {}
    mt.SparseTraining(mt.sparsity.StaticSparse(0.5)).convert(model)
    first, last = (
        mt.sparsity.sparse_weights(model)[f"net.layers.{n}.linear1.weight"].positions() for n in (0, 2)
    )
    assert not torch.equal(first, last)


@pytest.mark.parametrize("frozen", [False, True])
def test_each_block_of_a_copied_network_follows_its_own(frozen: bool) -> None:
    net = encoder()
    model = Places(student=net, teacher=copy.deepcopy(net).requires_grad_(not frozen))
    names = [f"layers.{n}.{part}" for n in range(3) for part in ("self_attn.out_proj", "linear1", "linear2")]
    assert linear_paths(model) == {f"teacher.{name}": f"student.{name}" for name in names}
    mt.SparseTraining(mt.sparsity.StaticSparse(0.5)).convert(model)
    found = {name: weight.positions() for name, weight in mt.sparsity.sparse_weights(model).items()}
    for name in names:
        assert torch.equal(found[f"teacher.{name}.weight"], found[f"student.{name}.weight"])


def test_a_frozen_copy_of_one_of_several_equal_blocks_is_refused() -> None:
    net = encoder()
    model = Places(net=net, held=copy.deepcopy(net.layers[1]).requires_grad_(False))
    with pytest.raises(MisconfigurationException, match=r"frozen copy 'held\.self_attn\.out_proj' follows"):
        linear_paths(model)
    assert linear_paths(Places(net=encoder(1), held=copy.deepcopy(net.layers[1]))) == {}
    assert mt.sparsity.Select(dense=["held.*"]).choose(model)[1].originals == {}


def test_constant_and_frozen_layers_are_no_copies() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for layer in net[1:]:
        nn.init.zeros_(layer.weight)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    nn.init.zeros_(frozen.weight)
    assert linear_paths(Places(net=net, frozen=frozen)) == {}
    twin = copy.deepcopy(frozen)
    assert linear_paths(Places(frozen=frozen, twin=twin)) == {}


def test_weights_that_only_begin_and_end_alike_are_no_copies() -> None:
    one = nn.Linear(32, 32)
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.weight[16, 3] += 1
    assert find_layer_copies(mt.sparsity.Select().choose(Places(one=one, other=other))[0]).equals == []


class Critics(Student):
    """Two critics that begin equal, each with a target that follows."""

    def make_teacher(self, frozen: bool) -> None:
        self.second = copy.deepcopy(self.student)
        self.target = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        target = self.target(batch)
        return (self.student(batch) - target - 1).square().mean() + (self.second(batch) - target).abs().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.student.parameters(), *self.second.parameters()], lr=0.1)


def test_a_copy_of_two_that_move_apart_is_refused(tmp_path: Path) -> None:
    message = r"which layer the copy 'target\.2' follows: it equals 'student\.2', 'second\.2', whose weights"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, "RigL", made(Critics))
    model, _ = fit(tmp_path, "StaticSparse", made(Critics))
    found = [mt.sparsity.sparse_weights(part)["2.weight"].positions() for part in model.children()]
    assert len(found) == 3
    assert all(torch.equal(positions, found[0]) for positions in found)


def test_two_copies_that_are_trained_move_apart(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, "RigL", made(Critics), layers=mt.sparsity.Select(dense=["target.*"]))
    first, second = (mt.sparsity.sparse_weights(part)["2.weight"] for part in (model.student, model.second))
    assert not torch.equal(first.positions(), second.positions())


class Blocks(LightningModule):
    """Blocks that begin equal, of which the optimizer has some."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(16, 16)
        self.blocks = nn.Sequential(nn.Flatten(), block, nn.Tanh(), copy.deepcopy(block), nn.Linear(16, 1))
        self.trained = ["1", "3", "4"]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.blocks(batch).square().mean()

    def configure_optimizers(self) -> Any:
        parts = [self.blocks.get_submodule(path) for path in self.trained]
        return torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1)

    train_dataloader = Student.train_dataloader


def train_all_but_one(folder: Path, training: mt.SparseTraining, model: Blocks) -> None:
    """One block is in no optimizer: it has to stay as it is."""
    model.trained = ["1", "4"]
    before = mt.sparsity.sparse_weights(model)["blocks.3.weight"]
    values, positions = before.values.detach().clone(), before.positions()
    assert not torch.equal(positions, mt.sparsity.sparse_weights(model)["blocks.1.weight"].positions())
    quiet_trainer(folder, training, max_epochs=1).fit(model)
    after = mt.sparsity.sparse_weights(model)["blocks.3.weight"]
    assert torch.equal(after.values, values)
    assert torch.equal(after.positions(), positions)


def test_a_second_run_leaves_blocks_alone_that_began_equal(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    training, model = mt.SparseTraining(mt.sparsity.StaticSparse(0.5)), Blocks()
    quiet_trainer(tmp_path, training, max_epochs=1).fit(model)
    train_all_but_one(tmp_path, training, model)


def test_copies_of_one_model_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    sparse_already, taught = Blocks(), Blocks()
    other_training = mt.SparseTraining(mt.sparsity.StaticSparse(0.5), seed=7)
    quiet_trainer(tmp_path, other_training, max_epochs=1).fit(sparse_already)
    taught.teacher = copy.deepcopy(taught.blocks).requires_grad_(False)
    training = mt.SparseTraining(mt.sparsity.StaticSparse(0.5))
    quiet_trainer(tmp_path, training, max_epochs=1).fit(taught)
    assert any("copies share the pattern" in event for event in training.technique_record().events)
    train_all_but_one(tmp_path, training, sparse_already)
    assert not any("copies share the pattern" in event for event in training.technique_record().events)


def test_a_model_that_was_validated_before_it_is_trained_is_as_converted(tmp_path: Path) -> None:
    class Validated(Blocks):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

        val_dataloader = Student.train_dataloader

    training, model = mt.SparseTraining(mt.sparsity.StaticSparse(0.5)), Validated()
    model.trained = ["1", "4"]
    trainer = quiet_trainer(tmp_path, training, max_epochs=1)
    trainer.validate(model, verbose=False)
    first, second = (mt.sparsity.sparse_weights(model)[f"blocks.{n}.weight"] for n in (1, 3))
    assert not torch.equal(first.positions(), second.positions())
    trainer.fit(model)
    assert torch.equal(first.positions(), second.positions())
