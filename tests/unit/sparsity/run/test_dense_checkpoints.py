"""What a run leaves: sparse layers, or dense ones that a project can use without knowing of sparse ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from tests.helpers.sparse import assert_equal_states
from tests.helpers.trainers import LIGHTNING_WARNINGS, assert_torch_is_as_found, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

WIDTH = 8
METHODS: dict[str, Any] = {
    "StaticSparse": lambda: mt.sparsity.StaticSparse(0.75),
    "SET": lambda: mt.sparsity.SET(0.75, drop=0.5),
    "RigL": lambda: mt.sparsity.RigL(0.75, drop=0.5),
    "DSR": lambda: mt.sparsity.DSR(0.75, threshold=0.05),
    "GMP": lambda: mt.sparsity.GradualMagnitudePruning(0.75),
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, WIDTH))
        self.up = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return sum((x @ self.up[number].t() + self.bias[number]).tanh() for number in range(2))


class Net(LightningModule):
    """A linear layer, a convolution, a recurrent layer, attention and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 16)
        self.conv = nn.Conv1d(16, WIDTH, 3, padding=1)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.experts = Experts()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.up(x).tanh().transpose(1, 2)).transpose(1, 2)
        x = self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.norm(self.experts(x).transpose(1, 2)).transpose(1, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", (self(batch) - batch).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(32, 5, WIDTH, generator=torch.Generator().manual_seed(3)), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def training(method: str = "RigL", leave: str = "dense", **options: Any) -> Any:
    update = options.pop("update", None if method == "StaticSparse" else mt.sparsity.UpdateEvery(3, stop=16))
    layers = mt.sparsity.Select(dense_ends=False)
    return mt.SparseTraining(METHODS[method](), update, layers, leave=leave, **options)


def fit(
    folder: Path, callback: Any, *others: Any, model: Net | None = None, **options: Any
) -> tuple[Net, Trainer]:
    seed_everything(1, verbose=False)
    model = Net() if model is None else model
    options = {"max_epochs": 2, "num_sanity_val_steps": 0} | options
    checkpoint = options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, callback, *others, **options)
    trainer.fit(model, ckpt_path=checkpoint)
    return model, trainer


def assert_plain(model: nn.Module) -> None:
    """Nothing of a sparse layer is left."""
    plain = Net()
    assert mt.sparsity.sparse_weights(model) == {}
    assert repr(model) == repr(plain)
    assert [type(one) for one in model.modules()] == [type(one) for one in plain.modules()]
    named = [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()]
    assert named == [(name, p.shape, p.requires_grad) for name, p in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        if not isinstance(ours, Net):
            assert ours.__dict__.keys() == theirs.__dict__.keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_plain_after_the_fit_with_the_weights_of_the_sparse_one(
    method: str, tmp_path: Path
) -> None:
    sparse, _ = fit(tmp_path, training(method, "sparse"))
    callback = training(method)
    model, trainer = fit(tmp_path, callback)
    assert len(mt.sparsity.sparse_weights(sparse)) == 6
    assert_plain(model)
    assert_torch_is_as_found(model)
    assert_equal_states(model.state_dict(), mt.sparsity.export_dense(sparse))
    batch = next(iter(model.train_dataloader()))
    assert torch.equal(model.eval()(batch), sparse.eval()(batch))
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert zeros >= sum(weight.numel - weight.nnz for weight in mt.sparsity.sparse_weights(sparse).values())
    own = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in own} == {id(p) for p in model.parameters()}
    assert all(p.dtype == torch.float32 for p in own)
    assert not any(name.startswith("on_") for name in model.__dict__)


def test_the_record_is_that_of_the_sparse_run(tmp_path: Path) -> None:
    records = []
    for leave in ("sparse", "dense"):
        callback = training(leave=leave)
        model, trainer = fit(tmp_path, callback)
        trainer.validate(model, verbose=False)
        records.append(callback.technique_record())
    assert records[0] == records[1]
    assert records[1].settings["num_grown"]


def test_its_own_saving_loading_and_predicting_work(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "best", save_last=True)
    model, trainer = fit(tmp_path, training(), saver, enable_checkpointing=True)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    loaded = Net()
    loaded.load_state_dict(torch.load(tmp_path / "own.pt"))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    predicted = torch.cat(trainer.predict(model))
    assert_plain(model)
    for path in (saver.best_model_path, saver.last_model_path, tmp_path / "after.ckpt"):
        from_checkpoint = Net.load_from_checkpoint(path, map_location="cpu")
        assert_equal_states(from_checkpoint.state_dict(), loaded.state_dict())
        plain = quiet_trainer(tmp_path)
        # The sparse form goes through another kernel of attention.
        torch.testing.assert_close(torch.cat(plain.predict(from_checkpoint)), predicted)
        assert_equal_states(model.state_dict(), loaded.state_dict())
    trainer.test(ckpt_path="best", verbose=False)
    assert_equal_states(model.state_dict(), loaded.state_dict())


def test_what_was_loaded_by_the_project_is_tested_as_it_is(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path, training())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "after.ckpt")
    # By the Trainer of the fit, whose callback makes the model sparse for as long as it takes.
    (expected,) = quiet_trainer(tmp_path).test(model, verbose=False)
    assert trainer.test(loaded, verbose=False) == [expected]
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert_plain(loaded)


def test_weights_alone_are_saved_dense_as_well(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    model, _ = fit(tmp_path, training(), saver, enable_checkpointing=True)
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "callbacks" not in saved
    assert_equal_states(saved["state_dict"], model.state_dict())


class SaveHalf(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_checkpoint_of_the_middle_is_resumed_exactly(method: str, tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, training(method, track_exploration=True), SaveHalf())
    middle = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert middle["state_dict"].keys() == Net().state_dict().keys()
    for leave in ("dense", "sparse"):
        resumed, _ = fit(
            tmp_path, training(method, leave, track_exploration=True), ckpt_path=tmp_path / "half.ckpt"
        )
        assert_equal_states(mt.sparsity.export_dense(resumed), whole.state_dict())
    fit(tmp_path, training(method, "sparse", track_exploration=True), SaveHalf())
    resumed, _ = fit(tmp_path, training(method, track_exploration=True), ckpt_path=tmp_path / "half.ckpt")
    assert_equal_states(resumed.state_dict(), whole.state_dict())


def test_a_damaged_pattern_beside_dense_weights_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, training("SET"), SaveHalf())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    (key,) = (key for key in saved["callbacks"] if key.startswith("SparseTraining"))
    nnz, pattern = saved["callbacks"][key]["stored"]["up"]
    saved["callbacks"][key]["stored"]["up"] = nnz + 1, pattern
    torch.save(saved, tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match=r"pattern of 'up.weight' in the checkpoint has 32 positions for 33"):
        fit(tmp_path, training("SET"), ckpt_path=tmp_path / "half.ckpt")


def test_hooks_of_the_model_see_dense_checkpoints(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Hooked(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(list(checkpoint["state_dict"]))
            checkpoint["state_dict"]["own"] = torch.ones(1)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(list(checkpoint["state_dict"]))
            del checkpoint["state_dict"]["own"]

    fit(tmp_path, training(), SaveHalf(), model=Hooked())
    fit(tmp_path, training(), model=Hooked(), ckpt_path=tmp_path / "half.ckpt")
    keys = set(Net().state_dict())
    assert [set(one) for one in seen] == [keys, {*keys, "own"}]


def test_a_second_fit_goes_on_from_the_first(tmp_path: Path) -> None:
    callback = training("SET", update=mt.sparsity.UpdateEvery(3, stop=8))
    model, trainer = fit(tmp_path, callback, max_epochs=1)
    zeros = {name: (p == 0).sum() for name, p in model.named_parameters()}
    moved = callback.technique_record().settings["num_grown"]
    assert moved
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert_plain(model)
    assert callback.technique_record().settings["num_grown"] == moved  # updates are over
    for name, p in model.named_parameters():
        # What had just grown, and was still 0, may have gone elsewhere.
        assert p.dim() < 2 or abs(int((p == 0).sum() - zeros[name])) <= p.numel() // 8, name


def test_evaluation_changes_no_weight_of_what_was_left(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path, training("DSR"))
    before = copy.deepcopy(model.state_dict())
    for run in (trainer.validate, trainer.test):
        run(model, verbose=False)
        assert_equal_states(model.state_dict(), before)
        assert_plain(model)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_after_an_error_it_is_sparse_and_the_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 10:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    class Saves(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
            trainer.save_checkpoint(tmp_path / "error.ckpt")

    model = Fails()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, training(), Saves(), model=model)
    assert len(mt.sparsity.sparse_weights(model)) == 6
    assert not any(name.startswith("on_") for name in model.__dict__)
    saved = torch.load(tmp_path / "error.ckpt", weights_only=True)["state_dict"]
    mt.sparsity.densify_(model)
    assert_equal_states(saved, model.state_dict())
    assert repr(model) == repr(Fails())
    resumed, trainer = fit(tmp_path, training(), ckpt_path=tmp_path / "error.ckpt")
    assert trainer.global_step == 16
    assert_plain(resumed)


def test_low_precision_and_stepping_in_backward(tmp_path: Path) -> None:
    half, trainer = fit(tmp_path, training("SET"), plugins=[mt.LowPrecision("bf16-true")])
    assert_plain(half)
    assert {p.dtype for p in trainer.optimizers[0].param_groups[0]["params"]} == {
        p.dtype for p in half.parameters()
    }
    stepped, _ = fit(tmp_path, training("StaticSparse"), mt.OptimizerInBackward())
    plain, _ = fit(tmp_path, training("StaticSparse"))
    assert_equal_states(stepped.state_dict(), plain.state_dict())
    assert_torch_is_as_found(stepped)


def test_a_wrong_leave_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"be 'sparse' or 'dense', but got leave='float'"):
        training(leave="float")


def test_shards_cannot_be_left_dense(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, training("SET"))
    trainer.strategy.__class__ = type("ModelParallelStrategy", (type(trainer.strategy),), {})
    with pytest.raises(MisconfigurationException, match=r"leave='dense'\)` needs .* ModelParallelStrategy"):
        trainer.fit(Net())


# ---------------------------------------------------------------------- without a Trainer


def test_layers_are_what_they_were_before() -> None:
    torch.manual_seed(0)
    model, hooked = Net(), []
    twin = copy.deepcopy(model)
    model.conv.register_forward_hook(lambda *_: hooked.append(1))
    places, _ = mt.sparsity.Select(dense_ends=False).choose(model)
    weights = mt.sparsify_(
        model, {place.name: torch.randperm(place.parameter.numel())[:50] for place in places.values()}
    )
    model.lstm.requires_grad_(False)
    twin.lstm.requires_grad_(False)
    twin.load_state_dict(mt.sparsity.export_dense(model))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 5, WIDTH)
    model(x).sum().backward()
    optimizer.step()
    twin.load_state_dict(mt.sparsity.export_dense(model))
    values = [weight.values for weight in weights.values()]
    mt.sparsity.densify_(model, [optimizer])
    own = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert own == {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in values}
    assert not any(p in optimizer.state for p in values)
    model.lstm.requires_grad_(True)
    assert_plain(model)
    hooked.clear()
    torch.testing.assert_close(model(x), twin(x))
    assert hooked == [1]
    model(x).sum().backward()
    optimizer.step()
    mt.sparsity.densify_(model)  # nothing is left to do


def test_one_parameter_of_several() -> None:
    lstm = nn.LSTM(4, 4)
    names = [name for name, _ in lstm.named_parameters()]
    mt.sparsify_(lstm, {"weight_hh_l0": torch.arange(7)})
    assert type(lstm) is not nn.LSTM
    mt.sparsity.densify_(lstm)
    assert type(lstm) is nn.LSTM
    assert [name for name, _ in lstm.named_parameters()] == names
    assert int((lstm.weight_hh_l0 != 0).sum()) == 7


def test_weights_that_are_sparse_already_keep_their_pattern() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    kept = torch.randperm(64)[:10].sort().values
    with torch.no_grad():
        model[0].weight.view(-1)[~torch.isin(torch.arange(64), kept)] = 0.0
        model[1].weight.zero_()
    before = copy.deepcopy(model)
    mt.SparseTraining(mt.sparsity.StaticSparse(0.75)).convert(model)
    first, second, third = (weight.positions() for weight in mt.sparsity.sparse_weights(model).values())
    assert len(first) == len(second) == len(third) == 16
    assert set(kept.tolist()) < set(first.tolist())
    assert torch.equal(model[0].weight, before[0].weight)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    mt.SparseTraining(mt.sparsity.StaticSparse(0.75)).convert(fresh)
    for place, positions in ((1, second), (2, third)):  # as in any model
        assert torch.equal(mt.sparsity.sparse_weights(fresh)[f"{place}.weight"].positions(), positions)


def test_a_model_whose_weights_have_moved_between_layers_keeps_them_all() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.view(-1)[20:] = 0.0
        model[1].weight.view(-1)[6:] = 0.0
    before = copy.deepcopy(model)
    mt.SparseTraining(mt.sparsity.DSR(0.75)).convert(model)
    weights = mt.sparsity.sparse_weights(model)
    assert [weight.nnz for weight in weights.values()] == [20, 12]
    for ours, theirs in zip(model, before, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
