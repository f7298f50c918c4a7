"""Recurrent layers and experts: parameters that are sparse, in modules that stay what they are."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain import MemoryLedger, sparsify_
from lightning_memtrain.sparsity import dense_state_dict, export_dense, sparse_weights, watch_candidates
from lightning_memtrain.sparsity.storage.patterns import Storage
from tests.helpers.sparse import assert_equal_states, mask_of
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

STORAGES: tuple[Storage, ...] = ("bitmask", "int32", "block16")


class Experts(nn.Module):
    """A mixture whose experts are slices of one parameter, as in transformers."""

    def __init__(self, width: int = 16, num_experts: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, 2 * width, width))
        self.down = nn.Parameter(torch.randn(num_experts, width, 2 * width))
        self.bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for number in range(len(self.up)):
            hidden = nn.functional.linear(x, self.up[torch.tensor(number)]).relu()
            total = total + hidden @ self.down.select(0, number).t() + self.bias[number]
        return total + torch.stack([x @ one.t() for one in self.up]).mean(0).chunk(2, -1)[0]


MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "LSTM": (lambda: nn.LSTM(8, 12, 2, bidirectional=True, batch_first=True), (3, 5, 8)),
    "LSTM, no bias": (lambda: nn.LSTM(8, 12, bias=False), (5, 3, 8)),
    "LSTM, one sequence": (lambda: nn.LSTM(8, 12), (5, 8)),
    "GRU": (lambda: nn.GRU(8, 12, 2), (5, 3, 8)),
    "RNN": (lambda: nn.RNN(8, 12, nonlinearity="relu"), (5, 3, 8)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 12), (3, 8)),
    "GRUCell": (lambda: nn.GRUCell(8, 12), (3, 8)),
    "RNNCell": (lambda: nn.RNNCell(8, 12), (3, 8)),
    "experts": (Experts, (3, 16)),
}


def sparse_and_dense(name: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    dense = make()
    positions = {
        key: torch.randperm(p.numel())[: p.numel() // 3].sort().values
        for key, p in dense.named_parameters()
        if "bias" not in key
    }
    with torch.no_grad():
        for key, chosen in positions.items():
            parameter = dense.get_parameter(key)
            parameter[mask_of(chosen, parameter) == 0] = 0.0
    sparse = copy.deepcopy(dense)
    sparsify_(sparse, positions, **options)
    return sparse, dense, positions, torch.randn(shape)


def output_of(module: Any, x: Tensor) -> Tensor:
    output = module(x)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients_are_those_of_the_dense_module(name: str, storage: Storage) -> None:
    sparse, dense, positions, x = sparse_and_dense(name, storage=storage)
    weights = sparse_weights(sparse)
    assert list(weights) == list(positions)
    outputs, gradients = [], []
    for module in (sparse, dense):
        own = x.clone().requires_grad_()
        outputs.append(output_of(module, own))
        outputs[-1].square().sum().backward()
        gradients.append(own.grad)
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)
    for key, chosen in positions.items():
        assert (weights[key].path, weights[key].module_path) == (key, f"{key}_sparse")
        assert torch.equal(weights[key].positions(), chosen)
        parameter = dense.get_parameter(key)
        # Slices of a parameter of three axes add up their gradients in another order than torch does.
        torch.testing.assert_close(weights[key].values.grad, parameter.grad.view(-1)[chosen])
    with torch.inference_mode():
        assert torch.equal(output_of(sparse, x), output_of(dense, x))
    assert isinstance(sparse, type(dense))
    for key, parameter in dense.named_parameters():
        assert torch.equal(getattr(sparse, key), parameter)


@pytest.mark.parametrize("name", MODULES)
def test_copies_files_and_other_dtypes(name: str) -> None:
    sparse, dense, positions, x = sparse_and_dense(name)
    expected = output_of(dense, x)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for twin in (copy.deepcopy(sparse), torch.load(file, weights_only=False)):
        assert torch.equal(output_of(twin, x), expected)
        assert list(sparse_weights(twin)) == list(positions)
    other, _, _, _ = sparse_and_dense(name)
    for weight in sparse_weights(other).values():
        weight.replace(torch.zeros(weight.nnz, dtype=torch.bool), torch.arange(5))
    other.load_state_dict(sparse.state_dict(), strict=True)
    assert torch.equal(output_of(other, x), expected)
    for exported in (export_dense(sparse), dense_state_dict(sparse.state_dict(), dense)):
        assert_equal_states(exported, dense.state_dict())
    sparse.double()
    assert output_of(sparse, x.double()).dtype == torch.float64
    assert torch.equal(output_of(sparse.float(), x), expected)
    with pytest.raises(RuntimeError, match=rf'"{next(iter(positions))}" is dense in the checkpoint'):
        sparse.load_state_dict(dense.state_dict())


@pytest.mark.parametrize("name", MODULES)
def test_writing_into_a_parameter_is_stored(name: str) -> None:
    sparse, dense, positions, _ = sparse_and_dense(name)
    key = next(iter(positions))
    for module in (sparse, dense):
        torch.manual_seed(3)
        nn.init.xavier_normal_(getattr(module, key))
    values = sparse_weights(sparse)[key].values
    assert torch.equal(values, getattr(dense, key).view(-1)[positions[key]])
    setattr(sparse, key, nn.Parameter(torch.ones_like(getattr(dense, key))))
    assert torch.equal(values, torch.ones(len(positions[key])))
    assert key not in dict(sparse.named_parameters())


def test_a_module_becomes_sparse_one_parameter_after_the_other() -> None:
    model = nn.LSTM(8, 12)
    x = torch.randn(5, 3, 8)
    sparsify_(model, {"weight_hh_l0": torch.arange(0, 576, 2)})
    assert type(model).__name__ == "SparseLSTM"
    sparsify_(model, {"weight_ih_l0": torch.arange(0, 384, 2)})
    assert sorted(sparse_weights(model)) == ["weight_hh_l0", "weight_ih_l0"]
    with pytest.raises(ValueError, match="'weight_ih_l0', but this weight is sparse already"):
        sparsify_(model, {"weight_ih_l0": torch.arange(3)})
    dense = nn.LSTM(8, 12)
    dense.load_state_dict(export_dense(model))
    assert torch.equal(model(x)[0], dense(x)[0])


def test_functional_gradients_of_a_recurrent_layer() -> None:
    sparse, _, _, x = sparse_and_dense("LSTM")
    state = dict(sparse.named_parameters())

    def loss(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(sparse, state, (x,))[0].square().sum()

    gradients = torch.autograd.grad(loss({key: 2 * p for key, p in state.items()}), list(state.values()))
    with torch.no_grad():
        for parameter in state.values():
            parameter.mul_(2)
    loss(state).backward()
    for key, gradient in zip(state, gradients, strict=True):
        torch.testing.assert_close(gradient, 2 * state[key].grad)


@pytest.mark.parametrize("name", ["LSTM", "experts"])
def test_fake_tensors(name: str) -> None:
    sparse, _, _, _ = sparse_and_dense(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(MODULES[name][1])
        output = x @ sparse.up[1].t() @ sparse.down[2].t() if name == "experts" else sparse(x)[0]
        output.sum().backward()
    assert type(output) is FakeTensor
    for weight in sparse_weights(sparse).values():
        assert weight.values.grad.shape == (weight.nnz,)


WIDTH, NUM_EXPERTS = 64, 8


def one_expert_bytes(storage: Storage) -> tuple[int, int]:
    torch.manual_seed(0)
    model = Experts(WIDTH, NUM_EXPERTS)
    positions = torch.randperm(model.up.numel())[: model.up.numel() // 16]
    sparsify_(model, {"up": positions}, storage=storage)
    x = torch.randn(2, WIDTH)
    with MemoryLedger(model, inputs=x) as ledger:
        start_bytes = ledger.current_bytes
        (x @ model.up[3].t()).sum().backward()
        gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert ledger.current_bytes - start_bytes <= gradient_bytes + 5376
    return ledger.breakdown().peak_bytes - start_bytes, 4 * model.up.numel()


@pytest.mark.parametrize("storage", STORAGES)
def test_of_one_expert_nothing_is_made_for_the_others(storage: Storage) -> None:
    peak_bytes, dense_bytes = one_expert_bytes(storage)
    # Weight and gradient of one of eight, and what is stored of all.
    assert peak_bytes < 2 * dense_bytes / NUM_EXPERTS + 3 * dense_bytes / 16
    assert peak_bytes > dense_bytes / NUM_EXPERTS


def test_experts_are_looked_at_alone_by_number_only() -> None:
    sparse, dense, _, _ = sparse_and_dense("experts")
    for look in (
        lambda w: w[1],
        lambda w: w[-1],
        lambda w: w[torch.tensor(2)],
        lambda w: w.select(0, 3),
        lambda w: w.select(1, 3),
        lambda w: w.unbind()[2],
        lambda w: w.unbind(1)[2],
        lambda w: list(w)[1],
        lambda w: w[1:3],
        lambda w: w[torch.tensor([1, 3])],
        lambda w: w[1, 2],
        lambda w: w[torch.tensor(True)],
        lambda w: w[None],
        lambda w: w[..., 0],
    ):
        assert torch.equal(look(sparse.up), look(dense.up))
    with pytest.raises(IndexError):
        sparse.up[4]
    with torch.no_grad():
        sparse.up[2].mul_(3.0)
        dense.up[2].mul_(3.0)
    assert torch.equal(sparse.up, dense.up)


def test_matrices_that_share_a_byte_of_the_bitmask_are_made_together() -> None:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.randn(3, 5, 3)))
    dense = copy.deepcopy(module)
    sparsify_(module, {"w": torch.arange(45)}, storage="bitmask")
    assert module.w_sparse.parts == ()
    module.w[1].square().sum().backward()
    dense.w[1].square().sum().backward()
    assert torch.equal(module.w_sparse.values.grad.view(3, 5, 3), dense.w.grad)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell", "experts"])
def test_candidates_are_the_largest_gradients_of_the_dense_twin(name: str) -> None:
    sparse, dense, positions, x = sparse_and_dense(name)
    weights = sparse_weights(sparse)
    counts = {key: weight.numel - weight.nnz for key, weight in weights.items()}
    with watch_candidates(weights, counts) as watch:
        output_of(sparse, x).square().sum().backward()
    output_of(dense, x).square().sum().backward()
    for key, chosen in positions.items():
        gradient = dense.get_parameter(key).grad.flatten()
        free = torch.ones(len(gradient), dtype=torch.bool).index_fill(0, chosen, False)
        found = watch.candidates(key)
        assert torch.equal(found.positions, free.nonzero().flatten()), key
        torch.testing.assert_close(found.gradients, gradient[free])


def test_the_best_candidates_of_all_experts_are_taken() -> None:
    sparse, dense, positions, x = sparse_and_dense("experts")
    weights = {"up": sparse_weights(sparse)["up"]}
    with watch_candidates(weights, {"up": 9}) as watch:
        for module in (sparse, dense):
            (3 * x @ module.up[2].t() + x @ module.up[0].t()).square().sum().backward()
    gradient = dense.up.grad.flatten()
    best = gradient.abs().index_fill(0, positions["up"], -1.0).topk(9).indices.sort().values
    assert torch.equal(watch.candidates("up").positions, best)
    assert torch.equal(watch.candidates("up").gradients, gradient[best])


def test_candidates_of_experts_go_back_to_what_they_were() -> None:
    sparse, _, _, _ = sparse_and_dense("experts")
    weights = {"up": sparse_weights(sparse)["up"]}
    watch = watch_candidates(weights, {"up": 4})
    search, x = sparse.up_sparse.search, torch.randn(3, 16)
    (x @ sparse.up[0].t()).square().sum().backward()
    before, kept = copy.deepcopy(watch.candidates("up")), search.restorable_state()
    for number in (0, 2):
        (x @ sparse.up[number].t()).square().sum().backward()
    assert not torch.equal(watch.candidates("up").gradients, before.gradients)
    kept.restore()
    assert torch.equal(watch.candidates("up").positions, before.positions)
    assert torch.equal(watch.candidates("up").gradients, before.gradients)
    assert [len(one) for one in kept.tensors] == [4]
    watch.close()


class Mixture(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.experts = Experts()
        self.upward = nn.ConvTranspose1d(16, 16, 4, stride=2)
        self.head = nn.Linear(16, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.experts(self.lstm(batch)[0])
        return self.head(self.upward(hidden.transpose(1, 2)).transpose(1, 2)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(16, 5, 16, generator=torch.Generator().manual_seed(3)), batch_size=4)


METHODS: dict[str, Callable[[], Any]] = {
    "StaticSparse": lambda: mt.sparsity.StaticSparse(0.75),
    "SET": lambda: mt.sparsity.SET(0.75, drop=0.5),
    "RigL": lambda: mt.sparsity.RigL(0.75, drop=0.5, distribution=mt.sparsity.ErdosRenyi()),
    "DSR": lambda: mt.sparsity.DSR(0.75, threshold=0.02),
}


@pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_them_and_is_resumed(name: str, tmp_path: Path) -> None:
    def fit(max_epochs: int, checkpoint: Path | None = None) -> tuple[Mixture, Any, Any]:
        seed_everything(1, verbose=False)
        update = None if name == "StaticSparse" else mt.sparsity.UpdateEvery(2, stop=8)
        callback, model = mt.SparseTraining(METHODS[name](), update), Mixture()
        trainer = quiet_trainer(tmp_path, callback, max_epochs=max_epochs)
        trainer.fit(model, ckpt_path=checkpoint)
        return model, callback, trainer

    model, callback, _ = fit(2)
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "experts.up", "experts.down", "upward.weight"]
    names += [] if name == "RigL" else ["head.weight"]  # by ErdosRenyi it would keep all of its weights
    assert list(sparse_weights(model)) == names
    settings = callback.technique_record().settings
    sparse_numel = 2 * 4 * 16 * 16 + 2 * 4 * 32 * 16 + 16 * 16 * 4 + (16 if "head.weight" in names else 0)
    all_numel = sum(p.numel() for p in Mixture().parameters())
    assert settings["share_of_all_parameters"] == round(sparse_numel / all_numel, 4)
    assert bool(settings["num_grown"]) is (name != "StaticSparse")
    short = pytest.warns(UserWarning, match="the run ends at step 4")
    with short if name != "StaticSparse" else nullcontext():
        _, _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, _ = fit(2, tmp_path / "half.ckpt")
    for (key, tensor), other in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
    plain = Mixture()
    plain.load_state_dict(export_dense(model))
    batch = next(iter(model.train_dataloader()))
    assert torch.equal(plain.training_step(batch, 0), model.training_step(batch, 0))
