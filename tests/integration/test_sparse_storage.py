"""Sparse layers under Lightning's Trainer: entries move between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_memtrain as mt
from lightning_memtrain import Microbatching, sparsify_
from lightning_memtrain.precision import SGD8bit
from lightning_memtrain.sparsity import export_dense, sparse_weights
from tests.helpers.sparse import mlp, random_positions
from tests.helpers.trainers import quiet_trainer


class Classifier(L.LightningModule):
    def __init__(self, optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp()
        self.make_optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class MoveRandomly(L.Callback):
    """Drops a third of each layer and grows as many (or fewer), after every optimizer step."""

    def __init__(self, grow: float = 1.0) -> None:
        self.grow = grow

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        generator = torch.Generator().manual_seed(trainer.global_step)
        for weight in sparse_weights(module).values():
            kept = torch.rand(weight.nnz, generator=generator) > 0.3
            free = torch.ones(weight.numel, dtype=torch.bool)
            free[weight.positions()] = False
            count = int(self.grow * int((~kept).sum()))
            order = torch.randperm(int(free.sum()), generator=generator)[:count]
            grown = free.nonzero().view(-1)[order].sort().values
            weight.replace(kept, grown, trainer.optimizers)


def data() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(64, 24), torch.randint(10, (64,))), batch_size=8)


@pytest.mark.parametrize("grow", [1.0, 0.5])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {}),
        (lambda p: SGD8bit(p, lr=0.1), {"gradient_clip_val": 1.0}),
        (torch.optim.AdamW, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
    ],
)
def test_entries_move_in_a_fit(optimizer: Any, options: dict[str, Any], grow: float, tmp_path: Path) -> None:
    model = Classifier(optimizer)
    sparsify_(model, random_positions(model))
    before = {name: weight.nnz for name, weight in sparse_weights(model).items()}
    trainer = quiet_trainer(tmp_path, MoveRandomly(grow), max_epochs=2, **options)
    trainer.fit(model, data())
    after = {name: weight.nnz for name, weight in sparse_weights(model).items()}
    assert after == before if grow == 1.0 else all(after[name] < nnz for name, nnz in before.items())
    (optimizer,) = trainer.optimizers
    for weight in sparse_weights(model).values():
        assert weight.values.isfinite().all()
        shapes = {
            value.shape for value in optimizer.state[weight.values].values() if isinstance(value, Tensor)
        }
        assert weight.values.shape in shapes


def test_entries_move_with_microbatches(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [Microbatching(num_microbatches=4)]):
        model = Classifier().double()
        sparsify_(model, random_positions(model))
        loader = DataLoader(
            TensorDataset(*(t.double() if t.is_floating_point() else t for t in data().dataset.tensors)),
            batch_size=8,
        )
        trainer = quiet_trainer(tmp_path, MoveRandomly(), *callbacks, precision="64-true")
        trainer.fit(model, loader)
        weights.append(export_dense(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("callbacks", "plugins"),
    [
        ([mt.ActivationCheckpointing(mt.checkpointing.Modules(["net.0", "net.2"]))], []),
        ([mt.CompressedActivations(mt.precision.ActivationCodec(group_size=8, min_numel=8))], []),
        ([mt.Microbatching(num_microbatches=1)], [mt.LowPrecision("bf16-true")]),
        ([], [mt.LowPrecision("16-true", scaler=mt.precision.ScalerConfig(init_scale=2.0**10))]),
    ],
    ids=["checkpointed", "compressed", "bfloat16", "float16"],
)
def test_entries_move_beside_other_techniques(
    callbacks: list[Any], plugins: list[Any], tmp_path: Path
) -> None:
    model = Classifier(lambda p: torch.optim.AdamW(p, lr=1e-3))
    sparsify_(model, random_positions(model))
    trainer = quiet_trainer(tmp_path, MoveRandomly(), *callbacks, plugins=plugins, max_epochs=2)
    trainer.fit(model, data())
    for weight in sparse_weights(model).values():
        state = trainer.optimizers[0].state[weight.values]
        assert state["exp_avg_sq"].shape == weight.values.shape
        assert state["exp_avg_sq"].dtype == torch.float32
        assert weight.values.isfinite().all()


class Attends(L.LightningModule):
    """Attention reads the weight of its output projection, and recurrent code asks it for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x = batch[0].unsqueeze(1).expand(-1, 6, -1).to(self.net.layers[0].linear2.weight.dtype)
        return self.net(x).square().mean() + self.net(x)[:, 0].cumsum(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("method", [mt.sparsity.StaticSparse(0.5), mt.sparsity.RigL(0.5, drop=0.5)])
def test_recomputation_is_chosen_where_weights_are_read(method: Any, tmp_path: Path) -> None:
    models, record = [], None
    for recomputation in ([], [mt.ActivationCheckpointing()]):
        update = mt.sparsity.UpdateEvery(2, stop=1.0) if isinstance(method, mt.sparsity.RigL) else None
        sparse = mt.SparseTraining(method, update)
        models.append(Attends())
        quiet_trainer(tmp_path, sparse, *recomputation, max_steps=4).fit(models[-1], data())
        record = recomputation and recomputation[0].technique_record()
    assert record.events
    assert "recomputed: peak" in record.events[0]
    assert len(sparse_weights(models[0])) == 9
    for (name, one), other in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_validation_and_prediction_of_attention(tmp_path: Path) -> None:
    class Predicts(Attends):
        def validation_step(self, batch: Any, _: int) -> None:
            self.log("loss", self.training_step(batch, 0))

        def predict_step(self, batch: Any, _: int) -> Tensor:
            return self.training_step(batch, 0)

    model, sparse = Predicts(), mt.SparseTraining(mt.sparsity.StaticSparse(0.8))
    trainer = quiet_trainer(tmp_path, sparse, max_steps=2)
    trainer.fit(model, data(), data())
    trainer.validate(model, data(), verbose=False)
    predicted = trainer.predict(model, data())
    dense = Predicts().eval()
    dense.load_state_dict(export_dense(model))
    with torch.no_grad():
        expected = [dense.training_step(batch, 0) for batch in data()]
    torch.testing.assert_close(torch.stack(predicted), torch.stack(expected))
