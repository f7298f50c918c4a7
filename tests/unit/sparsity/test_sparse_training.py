"""The callback in real runs: when it converts, counts and changes, and what it refuses."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_memtrain as mt
from lightning_memtrain.sparsity import distributed
from lightning_memtrain.sparsity.pattern_updater import PatternUpdater
from tests.helpers.trainers import LIGHTNING_WARNINGS, assert_torch_is_as_found, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

WIDTH, ROWS, NUM_BATCHES = 8, 4, 6
METHODS: dict[str, Any] = {
    "StaticSparse": lambda: mt.sparsity.StaticSparse(0.75),
    "SET": lambda: mt.sparsity.SET(0.75),
    "RigL": lambda: mt.sparsity.RigL(0.75, drop=mt.sparsity.CosineSchedule(0.5)),
    "DSR": lambda: mt.sparsity.DSR(0.75, threshold=0.05),
    "GMP": lambda: mt.sparsity.GradualMagnitudePruning(0.75),
    "GMP, global": lambda: mt.sparsity.GradualMagnitudePruning(0.75, scope="global"),
}
EVERY_TWO = mt.sparsity.UpdateEvery(2, stop=1.0)


class Net(LightningModule):
    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.head = nn.Linear(WIDTH, 1)
        self.make_optimizer = make_optimizer or (lambda m: torch.optim.AdamW(m.parameters(), lr=0.02))

    def loss(self, batch: Tensor) -> Tensor:
        return (self.head(self.body(batch)) - batch[:, :1]).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)

    def train_dataloader(self) -> Any:
        rows = torch.randn(ROWS * NUM_BATCHES, WIDTH, generator=torch.Generator().manual_seed(3))
        return DataLoader(rows, batch_size=ROWS)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


class Watcher:
    """Notes the optimizer step of every update, and that it came at the end of a batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        inner = PatternUpdater.update

        def update(updater: PatternUpdater, moment: Any, optimizers: Any) -> Any:
            self.steps.append(moment.step)
            return inner(updater, moment, optimizers)

        monkeypatch.setattr(PatternUpdater, "update", update)


def fit(
    folder: Path, callback: Any, model: LightningModule | None = None, *others: Any, **options: Any
) -> tuple[Any, Trainer]:
    seed_everything(1, verbose=False)
    model = Net() if model is None else model
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0} | options
    checkpoint = options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, callback, *others, **options)
    trainer.fit(model, ckpt_path=checkpoint)
    return model, trainer


class Stop(Exception):
    """An interruption; unlike fewer epochs it leaves the length of the run, and so schedules, as they are."""


class StopAfterTwoEpochs(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")
            raise Stop


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_with_as_many_weights_as_it_says(name: str, tmp_path: Path) -> None:
    callback = mt.SparseTraining(METHODS[name](), update=None if name == "StaticSparse" else EVERY_TWO)
    model, trainer = fit(tmp_path, callback)
    weights = mt.sparsity.sparse_weights(model)
    assert list(weights) == ["body.0.weight", "body.2.weight", "head.weight"]
    planned = {"body.0.weight": 32, "body.2.weight": 32, "head.weight": 2}
    counts = {weight: one.nnz for weight, one in weights.items()}
    if name in ("DSR", "GMP, global"):
        assert sum(counts.values()) == sum(planned.values())
    else:
        assert counts == planned
    record = callback.technique_record()
    assert record.settings["nnz"] == 66
    assert record.settings["sparsity"] == 0.75
    moved = name != "StaticSparse"
    assert bool(record.settings["num_dropped"]) is moved
    if name in ("SET", "RigL", "DSR"):
        assert record.settings["num_dropped"] == record.settings["num_grown"]
    assert ("threshold" in record.settings) is (name == "DSR")
    assert mt.core.TechniqueRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    state = trainer.optimizers[0].state
    for weight in weights.values():
        assert state[weight.values]["exp_avg"].shape == (weight.nnz,)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_resumed_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def callback() -> Any:
        update = None if name == "StaticSparse" else EVERY_TWO
        return mt.SparseTraining(METHODS[name](), update, track_exploration=True)

    one = callback()
    whole, trainer = fit(tmp_path, one, max_epochs=3)
    with pytest.raises(Stop):
        fit(tmp_path, callback(), None, StopAfterTwoEpochs(), max_epochs=3)
    two = callback()
    resumed, resumed_trainer = fit(tmp_path, two, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert_same(whole, resumed)
    for key, value in trainer.optimizers[0].state_dict()["state"].items():
        for field, tensor in value.items():
            assert torch.equal(tensor, resumed_trainer.optimizers[0].state_dict()["state"][key][field])
    assert one.state_dict().keys() == two.state_dict().keys()
    assert one.technique_record().settings == two.technique_record().settings


def test_layers_that_store_everything_train_as_dense_ones(tmp_path: Path) -> None:
    method = mt.sparsity.GradualMagnitudePruning(mt.sparsity.LinearSchedule(0.0, 0.0))
    model, _ = fit(tmp_path, mt.SparseTraining(method, EVERY_TWO))
    assert [weight.nnz for weight in mt.sparsity.sparse_weights(model).values()] == [128, 128, 8]
    plain, _ = fit(tmp_path, Callback())
    for name, tensor in mt.sparsity.export_dense(model).items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_updates_are_counted_in_optimizer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Watcher(monkeypatch)
    _, trainer = fit(
        tmp_path,
        mt.SparseTraining(mt.sparsity.RigL(0.75), EVERY_TWO),
        accumulate_grad_batches=3,
        max_epochs=3,
    )
    assert trainer.global_step == 6
    assert seen.steps == [2, 4, 6]


@pytest.mark.parametrize(
    "method", [mt.sparsity.SET(0.75), mt.sparsity.RigL(0.5, drop=0.5), mt.sparsity.DSR(0.75, threshold=0.05)]
)
def test_accumulated_batches_and_microbatches_train_as_the_whole_batch(method: Any, tmp_path: Path) -> None:
    def callback() -> Any:
        return mt.SparseTraining(copy.deepcopy(method), EVERY_TWO)

    class Halves(Net):
        def train_dataloader(self) -> Any:
            return DataLoader(super().train_dataloader().dataset, batch_size=ROWS // 2)

    plain, _ = fit(tmp_path, callback())
    split, _ = fit(tmp_path, callback(), None, mt.Microbatching(num_microbatches=2))
    seed_everything(1, verbose=False)
    accumulated, trainer = fit(tmp_path, callback(), Halves(), accumulate_grad_batches=2)
    assert trainer.global_step == 2 * NUM_BATCHES
    checkpointed, _ = fit(
        tmp_path, callback(), None, mt.ActivationCheckpointing(["body"]), mt.Microbatching(num_microbatches=1)
    )
    assert_same(plain, checkpointed)
    for name, weight in mt.sparsity.sparse_weights(plain).items():
        for other in (split, accumulated):
            twin = mt.sparsity.sparse_weights(other)[name]
            assert torch.equal(weight.positions(), twin.positions())
            torch.testing.assert_close(weight.values, twin.values, rtol=1e-4, atol=1e-5)


def test_rigl_grows_where_the_dense_gradient_is_largest(tmp_path: Path) -> None:
    """By the gradient of a dense twin in the same step, clipped weights notwithstanding."""

    class Once(Net):
        def on_after_backward(self) -> None:
            if self.global_step == 1:
                dense = Net()
                dense.load_state_dict(mt.sparsity.export_dense(self))
                dense.loss(self.batch).backward()
                self.gradient = dense.body[0].weight.grad.flatten()
                self.before = mt.sparsity.sparse_weights(self)["body.0.weight"].positions()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.batch = batch
            return self.loss(batch)

    callback = mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.25), EVERY_TWO)
    model, _ = fit(tmp_path, callback, Once(), max_steps=2, max_epochs=-1, gradient_clip_val=1e-3)
    weight = mt.sparsity.sparse_weights(model)["body.0.weight"]
    after, before = set(weight.positions().tolist()), set(model.before.tolist())
    grown, dropped = after - before, before - after
    others = set(range(weight.numel)) - after - dropped
    assert len(grown) == len(dropped)
    assert grown
    size = model.gradient.abs()
    assert min(size[list(grown)]) >= max(size[list(others)])


class Attends(Net):
    """Attention takes the weight of its output projection without calling that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.0)

    def loss(self, batch: Tensor) -> Tensor:
        return (self.head(self.body(batch[:, None])).squeeze(1) - batch[:, :1]).square().mean()


def test_rigl_moves_weights_that_are_used_without_their_layer(tmp_path: Path) -> None:
    callback = mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.5), mt.sparsity.UpdateEvery(12, stop=1.0))
    model, first = Attends(), {}

    class Begins(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            first.update(
                {name: weight.positions() for name, weight in mt.sparsity.sparse_weights(pl_module).items()}
            )

    fit(tmp_path, callback, model, Begins())
    for name, weight in mt.sparsity.sparse_weights(model).items():
        assert not torch.equal(weight.positions(), first[name]), name
    assert "body.self_attn.out_proj.weight" in first


def test_a_layer_that_no_backward_came_through_is_named_once(tmp_path: Path) -> None:
    model = Net()
    model.spare = nn.Linear(WIDTH, WIDTH)
    with pytest.warns(
        mt.core.NoEffectWarning, match=r"RigL moves no weights of 'spare' .* step 2, since"
    ) as caught:
        fit(tmp_path, mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.5), EVERY_TWO), model)
    assert len([one for one in caught if one.category is mt.core.NoEffectWarning]) == 1


def test_candidates_are_watched_only_in_the_step_before_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[int] = []
    inner = PatternUpdater.watch
    monkeypatch.setattr(
        PatternUpdater,
        "watch",
        lambda self, moment, **how: (watched.append(moment.step), inner(self, moment, **how))[1],
    )

    class Looks(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            is_on = self.body[0].search is not None
            assert is_on == (self.global_step + 1 in (4, 8))
            return super().training_step(batch, batch_idx)

    fit(
        tmp_path,
        mt.SparseTraining(mt.sparsity.RigL(0.75), mt.sparsity.UpdateEvery(4, stop=1.0)),
        Looks(),
        accumulate_grad_batches=1,
    )
    assert watched == [4, 8, 12]


def test_a_step_that_is_left_out_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Watcher(monkeypatch)

    class Overflows(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            # The loss of the step that an update was to follow.
            return self.loss(batch) * (torch.inf if self.trainer.global_step == 1 else 1.0)

    plugin = mt.LowPrecision("16-true", scaler=mt.precision.ScalerConfig(init_scale=2.0))
    callback = mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.5), EVERY_TWO)
    model, trainer = fit(tmp_path, callback, Overflows(), plugins=[plugin], max_steps=6, max_epochs=-1)
    assert trainer.global_step == 6
    assert plugin.scaler is not None
    assert plugin.scaler.num_skipped == 1
    assert seen.steps == [2, 4]
    assert all(p.isfinite().all() for p in model.parameters())


def test_low_precision_keeps_values_in_half_precision(tmp_path: Path) -> None:
    callback = mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.5), EVERY_TWO)
    model, trainer = fit(tmp_path, callback, None, plugins=[mt.LowPrecision("bf16-true")])
    for weight in mt.sparsity.sparse_weights(model).values():
        assert weight.values.dtype == torch.bfloat16
        assert trainer.optimizers[0].state[weight.values]["exp_avg"].dtype == torch.float32
    assert callback.technique_record().settings["num_grown"]


class Manual(Net):
    """Two optimizers, stepped by hand, one of them twice per batch."""

    def __init__(self) -> None:
        super().__init__(
            lambda m: [
                torch.optim.Adam(m.body.parameters(), lr=0.01),
                torch.optim.SGD(m.head.parameters(), lr=0.01, momentum=0.9),
            ]
        )
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        body, head = self.optimizers()
        for optimizer in (body, head, body):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize("method", [mt.sparsity.RigL(0.75, drop=0.5), mt.sparsity.DSR(0.75, threshold=0.05)])
def test_manual_optimization_with_several_optimizers(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watcher(monkeypatch)
    model, trainer = fit(
        tmp_path, mt.SparseTraining(method, mt.sparsity.UpdateEvery(4, stop=10)), Manual(), max_epochs=1
    )
    # Steps of the first optimizer; the update follows the batch in which its fourth and eighth step were.
    assert trainer.global_step == 18
    assert seen.steps == [4, 8]
    assert sum(weight.nnz for weight in mt.sparsity.sparse_weights(model).values()) == 66


def test_layers_made_in_configure_model_become_sparse(tmp_path: Path) -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = None

        def configure_model(self) -> None:
            if self.body is None:
                self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    model, _ = fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO), Late())
    assert len(mt.sparsity.sparse_weights(model)) == 3
    assert "configure_model" not in model.__dict__


def test_a_model_that_was_made_sparse_by_hand_keeps_its_pattern(tmp_path: Path) -> None:
    model = Net()
    positions = torch.tensor([0, 5, 9])
    mt.sparsify_(model, {"body.0.weight": positions})
    model, _ = fit(tmp_path, mt.SparseTraining(mt.sparsity.StaticSparse(0.5)), model)
    assert list(mt.sparsity.sparse_weights(model)) == ["body.0.weight"]
    assert torch.equal(mt.sparsity.sparse_weights(model)["body.0.weight"].positions(), positions)


def test_evaluation_before_the_fit_sees_the_model_that_is_trained(tmp_path: Path) -> None:
    model, callback = Net(), mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO)
    trainer = quiet_trainer(tmp_path, callback, max_epochs=1)
    trainer.validate(model, verbose=False)
    before = mt.sparsity.sparse_weights(model)["body.0.weight"].positions()
    assert len(before) == 32
    trainer.fit(model)
    after = mt.sparsity.sparse_weights(model)["body.0.weight"].positions()
    assert len(after) == 32
    assert not torch.equal(before, after)


def test_a_second_fit_goes_on_from_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Watcher(monkeypatch)
    callback = mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), mt.sparsity.UpdateEvery(4, stop=1.0))
    model, trainer = fit(tmp_path, callback, max_epochs=1)
    assert seen.steps == [4]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert seen.steps == [4, 8, 12]
    again = quiet_trainer(tmp_path, callback, max_epochs=1, limit_val_batches=0)
    again.fit(model)
    assert seen.steps == [4, 8, 12, 4]
    assert mt.sparsity.sparse_weights(model)["body.0.weight"].nnz == 32


def test_the_model_is_left_without_hooks(tmp_path: Path) -> None:
    callback = mt.SparseTraining(mt.sparsity.RigL(0.75), EVERY_TWO)
    model, trainer = fit(tmp_path, callback)
    assert_torch_is_as_found(model)
    assert not model._load_state_dict_pre_hooks
    assert not trainer.optimizers or not trainer.optimizers[0]._optimizer_step_post_hooks
    assert model.body[0].search is None


def test_an_error_leaves_no_hooks_either(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.global_step == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model, callback = Fails(), mt.SparseTraining(mt.sparsity.RigL(0.75), EVERY_TWO)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, callback, model)
    assert_torch_is_as_found(model)
    assert "configure_model" not in model.__dict__
    assert model.body[0].search is None
    assert "dense_bytes" in callback.technique_record().settings


def test_the_record_says_what_dense_training_would_take(tmp_path: Path) -> None:
    callback = mt.SparseTraining(mt.sparsity.StaticSparse(0.75), storage="bitmask")
    fit(tmp_path, callback)
    settings = callback.technique_record().settings
    # Weight, gradient and two moments of 264 weights; of 66 of them, and a bit for each of 264.
    assert settings["dense_bytes"] == 264 * 16
    assert settings["sparse_bytes"] == 66 * 16 + 264 // 8
    assert (
        "weights, gradients and optimizer state of 3 sparse layers take 1.06 KiB; dense ones would take "
        "4.12 KiB" in callback.technique_record().events
    )


class Embeds(Net):
    """Most of its parameters are an embedding, which stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, WIDTH)

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch + self.embedding(torch.arange(len(batch))))


def test_sparse_training_that_reaches_little_says_so(tmp_path: Path) -> None:
    def share(model: Net, select: Any = None, method: Any = None) -> float:
        callback = mt.SparseTraining(method or mt.sparsity.StaticSparse(0.75), layers=select)
        fit(tmp_path, callback, model, max_steps=1, max_epochs=-1)
        record = callback.technique_record()
        found = record.settings["share_of_all_parameters"]
        assert f"layers with {found:.1%} of all parameters are sparse, with" in record.events[0]
        return found

    assert share(Net()) == round(264 / 289, 4)
    expected = (
        r"reaches 264 of 4,289 trained parameters, 6\.2%, so that it saves little\. The largest that stay "
        r"dense are 'embedding\.weight' \(4,000\), 'body\.0\.bias' \(16\), 'body\.2\.bias' \(8\)"
    )
    with pytest.warns(UserWarning, match=expected):
        assert share(Embeds()) == round(264 / 4289, 4)
    # What somebody has chosen, or froze, is no surprise.
    assert share(Embeds(), mt.sparsity.Select(dense=["embedding"])) == round(264 / 4289, 4)
    assert share(Embeds(), mt.sparsity.Select(types=["Linear"])) == round(264 / 4289, 4)
    assert share(Embeds(), None, mt.sparsity.StaticSparse({"body.*": 0.5})) == round(256 / 4289, 4)
    frozen = Embeds()
    frozen.embedding.requires_grad_(False)
    assert share(frozen) == round(264 / 4289, 4)


def test_the_record_is_still_there_after_an_evaluation(tmp_path: Path) -> None:
    callback = mt.SparseTraining(mt.sparsity.StaticSparse(0.75))
    model, trainer = fit(tmp_path, callback)
    before = callback.technique_record()
    trainer.validate(model, verbose=False)
    assert callback.technique_record() == before
    assert "sparse_bytes" in before.settings


def test_a_method_that_starts_dense_says_so_in_the_record(tmp_path: Path) -> None:
    callback = mt.SparseTraining(mt.sparsity.GradualMagnitudePruning(0.75), EVERY_TWO)
    fit(tmp_path, callback)
    assert callback.technique_record().events[0].endswith("; the peak is that of dense training")


def test_values_are_logged_at_every_update(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = mt.SparseTraining(
        mt.sparsity.DSR(0.75, threshold=0.05), mt.sparsity.UpdateEvery(4, stop=1.0), track_exploration=True
    )
    fit(tmp_path, callback, logger=logger, log_every_n_steps=1)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [3, 7, 11]
    assert set(rows[0]) - {"step"} == {
        "sparsity/nnz/body.0",
        "sparsity/nnz/body.2",
        "sparsity/nnz/head",
        "sparsity/pruned",
        "sparsity/grown",
        "sparsity/threshold",
        "sparsity/exploration_rate",
    }
    rates = [row["sparsity/exploration_rate"] for row in rows]
    assert 0.25 <= rates[0] <= rates[1] <= rates[2] <= 1
    assert sum(rows[-1][f"sparsity/nnz/{name}"] for name in ("body.0", "body.2", "head")) == 66


def test_deterministic_mode(tmp_path: Path) -> None:
    def run() -> Any:
        return fit(
            tmp_path, mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.5), EVERY_TWO), deterministic=True
        )[0]

    try:
        assert_same(run(), run())
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_global_random_numbers_are_left_alone(tmp_path: Path) -> None:
    fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO))
    sparse = torch.rand(1)
    fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO, seed=7))
    assert torch.equal(sparse, torch.rand(1))


def test_frozen_layers_stay_dense_or_keep_their_pattern(tmp_path: Path) -> None:
    model = Net()
    model.body[0].requires_grad_(False)
    model, _ = fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO), model)
    weights = mt.sparsity.sparse_weights(model)
    assert list(weights) == ["body.2.weight", "head.weight"]
    weights["body.2.weight"].values.requires_grad_(False)
    before = weights["body.2.weight"].positions()
    fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO), model)
    assert torch.equal(mt.sparsity.sparse_weights(model)["body.2.weight"].positions(), before)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(WIDTH)


class EndlessNet(Net):
    def train_dataloader(self) -> Any:
        return DataLoader(Endless(), batch_size=ROWS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mt.SparseTraining(0.9), r"`SparseTraining\(method\)` must be a method such as RigL"),
        (
            lambda: mt.SparseTraining(mt.sparsity.SET(0.9), update=100),
            r"update schedule such as UpdateEvery\(100\)",
        ),
        (lambda: mt.SparseTraining(mt.sparsity.SET(0.9), layers=["fc"]), r"must be a Select"),
        (lambda: mt.SparseTraining(mt.sparsity.SET(0.9), storage="csr"), r"'block16', but got storage='csr'"),
        (
            lambda: mt.SparseTraining(mt.sparsity.SET(0.9), chunk_bytes=0),
            r"`SparseTraining\(chunk_bytes\)` must be a number of bytes, at least 1, .* but got 0\.",
        ),
        (lambda: mt.SparseTraining(mt.sparsity.SET(0.9), chunk_bytes=True), "but got True"),
        (lambda: mt.SparseTraining(mt.sparsity.SET(0.9), chunk_bytes="1 mib"), "units are .* whole weights"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_runs_that_cannot_work_are_refused(tmp_path: Path) -> None:
    def refused(match: str, model: Any, *callbacks: Any, **options: Any) -> None:
        with pytest.raises(MisconfigurationException, match=match):
            fit(tmp_path, callbacks[0], model, *callbacks[1:], **options)

    def sparse(method: Any = None, update: Any = EVERY_TWO) -> Any:
        return mt.SparseTraining(method or mt.sparsity.SET(0.75), update)

    refused("given once, but got it twice", Net(), sparse(), _Twin(mt.sparsity.SET(0.75)))
    refused("StochasticWeightAveraging: an average", Net(), sparse(), StochasticWeightAveraging(0.1))
    refused("ModelPruning, which masks", Net(), sparse(), ModelPruning("l1_unstructured"))
    refused(
        "at most the number of nonzero weights, 66", Net(), sparse(mt.sparsity.DSR(0.75, reallocate=20_000))
    )
    endless = {"max_steps": -1, "max_epochs": -1}
    refused(
        r"the fraction 0\.75 of the run", EndlessNet(), sparse(update=mt.sparsity.UpdateEvery(2)), **endless
    )
    refused(
        "epochs of a known length",
        EndlessNet(),
        sparse(update=mt.sparsity.UpdatePiecewise({0: 5})),
        **endless,
    )
    piecewise = mt.sparsity.UpdatePiecewise({0: 5}, unit="step")
    refused("the updates need an end, but there is none", EndlessNet(), sparse(update=piecewise), **endless)
    tied = Net()
    tied.body[0].weight = tied.body[2].weight
    refused(r"cannot make 'body\.2' sparse, since its weight is tied to 'body\.0\.weight'", tied, sparse())
    lazy = Net()
    lazy.body[0] = nn.LazyLinear(16)
    refused(r"'body\.0' is LazyLinear", lazy, sparse())
    named = Net()
    named.body[0] = Named(WIDTH, 16)
    refused(r"'body\.0' sparse, since Named is a class .* Add 'body\.0' to Select\(dense", named, sparse())


class Named(nn.Linear):
    """Its forward is torch's, its methods are its own."""


class _Twin(mt.SparseTraining):
    """Lightning refuses two callbacks of one class by itself, though not in all its versions."""

    @property
    def state_key(self) -> str:
        return "twin"


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy"])
def test_strategies_that_shard_are_refused(name: str, tmp_path: Path) -> None:
    callback = mt.SparseTraining(mt.sparsity.SET(0.9))
    trainer = quiet_trainer(tmp_path, callback)
    trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})
    with pytest.raises(MisconfigurationException, match=f"whole on each device, .* but got {name}"):
        trainer.fit(Net())


@pytest.mark.parametrize("method", [mt.sparsity.DSR(0.5), mt.sparsity.GradualMagnitudePruning(0.5)])
def test_changing_counts_are_refused_with_shards(method: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, mt.SparseTraining(method))
    trainer.strategy.__class__ = type("ModelParallelStrategy", (type(trainer.strategy),), {})
    expected = f"under ModelParallelStrategy, .* but got {type(method).__name__}.* Use RigL, SET or"
    with pytest.raises(MisconfigurationException, match=expected):
        trainer.fit(Net())


def test_what_has_no_effect_warns(tmp_path: Path) -> None:
    with pytest.raises(mt.ArgumentError, match=r"`Select\(types\)` must name modules of the model"):
        fit(
            tmp_path,
            mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO, mt.sparsity.Select(types=("Conv2d",))),
        )
    with pytest.warns(mt.core.NoEffectWarning, match=r"leaves all of body\.0, body\.2, head dense"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.0), EVERY_TWO))
    with pytest.warns(mt.core.NoEffectWarning, match="no update is due in the 12 steps"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75)))
    with pytest.warns(mt.core.NoEffectWarning, match="whose pattern never changes"):
        mt.SparseTraining(mt.sparsity.StaticSparse(0.75), EVERY_TWO)
    with pytest.warns(UserWarning, match=r"stops at step 100, but the run ends at step 12"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), mt.sparsity.UpdateEvery(2, stop=100)))
    with pytest.warns(mt.core.NoEffectWarning, match=r"less than one weight .* updates stop at step 12\."):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.RigL(0.75), mt.sparsity.UpdateEvery(12, stop=1.0)))
    only_bias = Net(lambda m: torch.optim.SGD([m.head.bias], lr=0.1))
    with pytest.warns(mt.core.NoEffectWarning, match="no optimizer has the weights"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO), only_bias)


@pytest.mark.parametrize("method", [mt.sparsity.SET(0.75), mt.sparsity.RigL(0.75)])
def test_the_only_update_of_a_run_moves_weights(method: Any, tmp_path: Path) -> None:
    callback = mt.SparseTraining(method, mt.sparsity.UpdateEvery(6))
    fit(tmp_path, callback)
    # Of 9 steps in which updates are made, 6 are gone: 0.15 (1 + cos(2 pi / 3)) = 0.075 of 32, 32 and 2.
    assert callback.technique_record().settings["num_dropped"] == 4


def test_counts_that_change_in_a_compiled_model_warn_unless_torch_allows_it(tmp_path: Path) -> None:
    def run(method: Any) -> None:
        model = Net()
        model.body.compile(backend="eager")
        fit(tmp_path, mt.SparseTraining(method, EVERY_TWO), model, max_epochs=1, limit_train_batches=2)

    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="DSR changes the number of weights of com"):
        run(mt.sparsity.DSR(0.75, threshold=0.05))
    run(mt.sparsity.SET(0.75, drop=0.5))
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        run(mt.sparsity.DSR(0.75, threshold=0.05))
    torch._dynamo.reset()


def test_ddp_is_refused_a_model_of_which_it_would_see_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_replicated", lambda strategy: True)
    model = Net()
    for layer in (model.body[0], model.body[2], model.head):
        layer.bias = None
    with pytest.raises(MisconfigurationException, match=r"with ddp needs .* Select\(dense=\['body\.0'\]\)"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO), model)


def test_a_trainer_that_goes_on_with_another_model_counts_anew(tmp_path: Path) -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH))

    callback = mt.SparseTraining(
        mt.sparsity.SET(0.75, drop=0.5), mt.sparsity.UpdateEvery(6, stop=1.0), track_exploration=True
    )
    _, trainer = fit(tmp_path, callback, max_epochs=1)
    assert callback.technique_record().settings["num_dropped"] == 16 + 16 + 1
    trainer.fit_loop.max_epochs = 2
    model = Wide()
    trainer.fit(model)
    settings = callback.technique_record().settings
    assert settings["nnz"] == 128 + 128 + 2
    assert settings["num_dropped"] == 64 + 64 + 1
    assert {name: len(one.bits) for name, one in callback._statistics.explored.items()} == {
        "body.0": 64,
        "body.2": 64,
        "head": 1,
    }


def test_a_model_can_be_copied_and_saved_amid_a_fit(tmp_path: Path) -> None:
    copies: list[Any] = []

    class LayerCopies(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert "configure_model" not in pl_module.__dict__
            copies.append(copy.deepcopy(pl_module))
            torch.save(pl_module.body, tmp_path / "body.pt")

    def callback() -> Any:
        return mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO)

    model, _ = fit(tmp_path, callback(), None, LayerCopies())
    before = copy.deepcopy(model.state_dict())
    twin, _ = fit(tmp_path, callback(), copies[0])
    assert_same(model, twin)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_resuming_with_another_distribution_is_refused(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.9), EVERY_TWO), max_epochs=1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    expected = r"`SET\(distribution\)` must .* loaded, Uniform\(\), but got ErdosRenyi\(\)"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(
            tmp_path,
            mt.SparseTraining(mt.sparsity.SET(0.9, distribution=mt.sparsity.ErdosRenyi()), EVERY_TWO),
            ckpt_path=path,
        )


class Shampoo(torch.optim.Optimizer):
    """Keeps a square matrix per parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["preconditioner"] = torch.eye(p.numel())
        return loss


def test_an_optimizer_whose_state_cannot_follow_is_refused_before_an_update(tmp_path: Path) -> None:
    def run(make_optimizer: Any, method: Any = None) -> Any:
        callback = mt.SparseTraining(
            method or mt.sparsity.SET(0.75), None if method else mt.sparsity.UpdateEvery(6)
        )
        model = Net(make_optimizer)
        try:
            return fit(tmp_path, callback, model)[1].global_step
        except (MisconfigurationException, TypeError) as error:
            return model.trainer.global_step, str(error)

    num_steps, error = run(lambda m: torch.optim.LBFGS(m.parameters()))
    assert num_steps == 0
    assert "cannot move weights under LBFGS, whose state is that of all parameters" in error
    num_steps, error = run(lambda m: Shampoo(m.parameters()))
    assert num_steps == 1
    assert "The state 'preconditioner' of Shampoo (Tensor of shape (32, 32)" in error
    # What never moves needs nothing of its optimizer.
    assert run(lambda m: Shampoo(m.parameters()), mt.sparsity.StaticSparse(0.75)) == 12


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_of_matrices_says_that_values_are_none(tmp_path: Path) -> None:
    model = Net(lambda m: torch.optim.Muon([m.body[0].values]))
    with pytest.raises(ValueError, match=r"Muon only supports 2D parameters .* torch\.Size\(\[32\]\)"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO), model)


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_averages_of_weights_are_refused(name: str, tmp_path: Path) -> None:
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    averages = getattr(callbacks, name)()
    with pytest.raises(MisconfigurationException, match=f"cannot be combined with {name}: an average"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO), None, averages)


def test_a_full_layer_keeps_its_pattern_and_trains(tmp_path: Path) -> None:
    model = Net()
    weights = mt.sparsify_(model, {"body.0.weight": torch.arange(128), "body.2.weight": torch.arange(32)})
    before = weights["body.0.weight"].values.clone()
    fit(tmp_path, mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.5), EVERY_TWO), model)
    assert torch.equal(weights["body.0.weight"].positions(), torch.arange(128))
    assert not torch.equal(weights["body.0.weight"].values, before)
    assert not torch.equal(weights["body.2.weight"].positions(), torch.arange(32))


def test_prediction_before_the_fit_sees_the_model_that_is_trained(tmp_path: Path) -> None:
    class Predicts(Net):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(self.body(batch))

    model, callback = Predicts(), mt.SparseTraining(mt.sparsity.StaticSparse(0.75))
    trainer = quiet_trainer(tmp_path, callback, max_epochs=1)
    predicted = trainer.predict(model, model.train_dataloader())
    positions = {name: weight.positions() for name, weight in mt.sparsity.sparse_weights(model).items()}
    dense = Predicts()
    dense.load_state_dict(mt.sparsity.export_dense(model))
    batches = list(model.train_dataloader())
    assert all(torch.equal(p, dense.head(dense.body(b))) for p, b in zip(predicted, batches, strict=True))
    trainer.fit(model)
    for name, weight in mt.sparsity.sparse_weights(model).items():
        assert torch.equal(weight.positions(), positions[name])


def test_a_step_that_torchs_own_scaler_leaves_out_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watcher(monkeypatch)

    class Overflows(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            # The loss of the step that an update was to follow.
            return self.loss(batch) * (torch.inf if batch_idx == 1 else 1.0)

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    callback = mt.SparseTraining(mt.sparsity.RigL(0.75, drop=0.5), EVERY_TWO)
    model, trainer = fit(tmp_path, callback, Overflows(), plugins=[plugin], max_epochs=1)
    # Of six batches, the second moved no weight; the update came with the step that was the second.
    assert [int(state["step"]) for state in trainer.optimizers[0].state.values()] == [5] * 6
    assert seen.steps == [2, 4]
    assert all(p.isfinite().all() for p in model.parameters())


def test_values_taken_for_biases_warn_and_name_the_group(tmp_path: Path) -> None:
    def groups(model: nn.Module) -> Any:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        return torch.optim.SGD(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.1
        )

    layers = mt.sparsity.Select(dense=["head"])
    with pytest.warns(
        UserWarning, match=r"2 sparse layers \('body\.0' \.\.\.\) are in param_groups\[1\] of SGD"
    ):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO, layers), Net(groups))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    class Diverges(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 1:
                self.body[2].values.grad.fill_(float("nan"))

    with pytest.raises(RuntimeError, match=r"weights of 'body\.2' must be finite .* update of step 2"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO), Diverges())


def test_resuming_differently_is_refused_or_warned_of(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO), max_epochs=1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)

    def resume(method: Any, **options: Any) -> None:
        fit(tmp_path, mt.SparseTraining(method, EVERY_TWO, **options), ckpt_path=path)

    with pytest.raises(MisconfigurationException, match=r"that of the checkpoint, .* 0\.75, but got 0\.5"):
        resume(mt.sparsity.SET(0.5))
    with pytest.raises(
        MisconfigurationException, match=r"`Select\(overrides\)` must .* \{\}, but got \{'head': 0\.5\}"
    ):
        resume(mt.sparsity.SET(0.75), layers=mt.sparsity.Select(overrides={"head": 0.5}))
    with pytest.raises(MisconfigurationException, match="'head' is sparse there and dense here"):
        resume(mt.sparsity.SET(0.75), layers=mt.sparsity.Select(dense=["head"]))
    with pytest.warns(UserWarning, match="written by `SET`, but the run goes on with `RigL`"):
        resume(mt.sparsity.RigL(0.75))
    with pytest.warns(UserWarning, match=r"written with `SparseTraining\(seed=0\)`, but got seed=1"):
        resume(mt.sparsity.SET(0.75), seed=1)
    saved = torch.load(path, weights_only=False)
    pattern = saved["state_dict"]["head.sparsity_pattern"]
    assert pattern.dtype == torch.uint8
    assert len(pattern) == 1
    saved["state_dict"]["head.sparsity_pattern"] = _rotated(pattern)
    torch.save(saved, path)
    with pytest.raises(
        MisconfigurationException, match="The pattern of 'head' must be the one that was saved"
    ):
        resume(mt.sparsity.SET(0.75))
    key = next(key for key in saved["callbacks"] if key.startswith("SparseTraining"))
    saved["callbacks"][key]["version"] = 2
    torch.save(saved, path)
    with pytest.raises(MisconfigurationException, match="version 1 or less, but got version 2"):
        resume(mt.sparsity.SET(0.75))


def _rotated(byte: Tensor) -> Tensor:
    return byte << 1 | byte >> 7


def test_a_dense_checkpoint_says_how_to_load_it(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(MisconfigurationException, match="Load dense weights into the model before"):
        fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75), EVERY_TWO), ckpt_path=tmp_path / "dense.ckpt")


def test_parts_can_be_loaded_once_the_fit_has_begun(tmp_path: Path) -> None:
    class LoadsHead(Net):
        def on_train_start(self) -> None:
            self.load_state_dict({"head.bias": torch.ones(1)}, strict=False)
            assert self.head.bias.item() == 1

    fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO), LoadsHead())


def test_a_sparse_checkpoint_becomes_a_dense_model(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO))
    path = tmp_path / "sparse.ckpt"
    trainer.save_checkpoint(path)
    loaded = Net()
    evaluated = quiet_trainer(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO))
    evaluated.validate(loaded, ckpt_path=path, verbose=False)
    assert_same(model, loaded)
    dense = Net()
    dense.load_state_dict(mt.sparsity.export_dense(loaded))
    batch = torch.ones(2, WIDTH)
    assert torch.equal(dense.loss(batch), model.loss(batch))


def test_loading_without_the_callback_says_what_to_do(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path, mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO))
    path = tmp_path / "sparse.ckpt"
    trainer.save_checkpoint(path)
    message = (
        r'Unexpected key\(s\) in state_dict: "sparse weights: load them in a Trainer with SparseTraining, '
        r'and save export_dense\(model\) for others",'
    )
    with pytest.raises(RuntimeError, match=message):
        Net.load_from_checkpoint(path)
    # Who made the model sparse by hand needs no Trainer, and the note is not among its own weights.
    positions = {weight.name: weight.positions() for weight in mt.sparsity.sparse_weights(model).values()}
    by_hand = Net()
    mt.sparsify_(by_hand, positions)
    by_hand.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert_same(model, by_hand)


def test_a_model_whose_part_was_made_sparse_by_hand_is_loaded_again(tmp_path: Path) -> None:
    def made() -> Net:
        model = Net()
        mt.sparsify_(model.body, {"0.weight": torch.arange(30)})
        return model

    def callback() -> Any:
        return mt.SparseTraining(mt.sparsity.SET(0.75, drop=0.5), EVERY_TWO)

    model, trainer = fit(tmp_path, callback(), made())
    path = tmp_path / "sparse.ckpt"
    trainer.save_checkpoint(path)
    evaluated, by_hand = made(), made()
    quiet_trainer(tmp_path, callback()).validate(evaluated, ckpt_path=path, verbose=False)
    assert_same(model, evaluated)
    resumed, _ = fit(tmp_path, callback(), made(), max_epochs=3, ckpt_path=path)
    assert mt.sparsity.sparse_weights(resumed)["body.0.weight"].nnz == 30
    by_hand.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert_same(model, by_hand)
    assert not any(part._load_state_dict_pre_hooks for part in by_hand.modules())
