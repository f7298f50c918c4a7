"""Making layers sparse: what is refused, and that nothing has changed then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations, prune

from lightning_memtrain import sparsify_
from lightning_memtrain.sparsity import SparseWeight, export_dense, sparse_weights


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def weight_norm_of_old() -> nn.Module:
    layer = nn.Linear(4, 3)
    weight = layer._parameters.pop("weight")
    layer.weight_g, layer.weight_v = nn.Parameter(weight.norm(dim=1, keepdim=True)), weight
    return layer


REFUSED: dict[str, tuple[Any, str, type[Exception], str]] = {
    "no such parameter": (nn.Linear, "kernel", ValueError, r"'0.kernel', but there is no such .* '0.weight'"),
    "tied": (Tied, "head.weight", ValueError, r"'0.head.weight', but this weight is tied to '0.embedding"),
    "weight norm": (
        lambda *_: parametrizations.weight_norm(nn.Linear(4, 3)),
        "weight",
        ValueError,
        "computed from other parameters",
    ),
    "spectral norm": (
        lambda *_: parametrizations.spectral_norm(nn.Linear(4, 3)),
        "weight",
        ValueError,
        "computed from other parameters",
    ),
    "former weight norm": (
        lambda *_: weight_norm_of_old(),
        "weight",
        ValueError,
        "computed from other parameters",
    ),
    "pruned": (
        lambda *_: prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5),
        "weight",
        ValueError,
        "computed from other parameters .*pruning",
    ),
    "lazy": (
        lambda *_: nn.LazyLinear(3),
        "weight",
        ValueError,
        "lazy layer has no weight yet. Run the model",
    ),
    "own forward": (OwnLinear, "weight", TypeError, "OwnLinear is a subclass of Linear, whose own forward"),
    "embedding": (nn.Embedding, "weight", TypeError, "'weight' of Embedding has no sparse form"),
    "norm": (lambda *_: nn.BatchNorm2d(3), "weight", TypeError, "'weight' of BatchNorm2d has no sparse form"),
    "bias": (nn.Linear, "bias", TypeError, "'bias' of Linear has no sparse form"),
    "attention": (
        lambda *_: nn.MultiheadAttention(4, 2),
        "in_proj_weight",
        TypeError,
        "'in_proj_weight' of MultiheadAttention has no sparse form. Leave it out: only weights of Linear,",
    ),
    "complex": (
        lambda *_: nn.Linear(4, 3, dtype=torch.complex64),
        "weight",
        TypeError,
        "it is torch.complex64, where floating-point",
    ),
    "huge": (
        lambda *_: nn.Linear(1 << 16, 1 << 15, device="meta"),
        "weight",
        ValueError,
        r"2147483648 entries, where fewer than 2\*\*31",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sparse_is_refused_before_anything_changed(name: str) -> None:
    make, attribute, error, message = REFUSED[name]
    model = nn.Sequential(make() if make is Tied else make(4, 3), nn.Linear(3, 2))
    positions = {"1.weight": torch.arange(2), f"0.{attribute}": torch.arange(2)}
    with pytest.raises(error, match=message):
        sparsify_(model, positions)
    assert type(model[1]) is nn.Linear
    assert sparse_weights(model) == {}


POSITIONS: dict[str, tuple[Tensor, str]] = {
    "a mask": (
        torch.ones(3, 4, dtype=torch.bool),
        r"integers of one axis, but got torch.bool of shape \(3, 4\)",
    ),
    "a flat mask": (torch.ones(12, dtype=torch.bool), "integers of one axis, but got torch.bool"),
    "floats": (torch.ones(3), "integers of one axis, but got torch.float32"),
    "negative": (torch.tensor([-1, 3]), "must be from 0 to 11, but got -1 to 3"),
    "too large": (torch.tensor([0, 12]), "must be from 0 to 11, but got 0 to 12"),
    "repeated": (torch.tensor([3, 1, 3]), "each position once, but got a repetition"),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_wrong_positions_are_refused(name: str) -> None:
    positions, message = POSITIONS[name]
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=message):
        sparsify_(layer, {"weight": positions})
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "masked"}, "but got storage='masked'"),
        ({"chunk_bytes": 0}, "`sparsify_.chunk_bytes.` must be a number of bytes, at least 1, .* but got 0"),
        ({"chunk_bytes": True}, "`sparsify_.chunk_bytes.` must be a number of bytes, .* but got True"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify_(nn.Linear(4, 3), {"weight": torch.arange(3)}, **options)


def test_a_layer_is_made_sparse_once() -> None:
    layer = nn.Linear(4, 3)
    sparsify_(layer, {"weight": torch.arange(3)})
    with pytest.raises(ValueError, match="sparse already"):
        sparsify_(layer, {"weight": torch.arange(3)})


def test_values_are_taken_from_the_weight_in_any_order_of_the_positions() -> None:
    layer = nn.Linear(4, 3)
    dense = layer.weight.detach().clone()
    found = sparsify_(layer, {"weight": torch.tensor([7, 0, 5], dtype=torch.int32)})
    assert list(found) == ["weight"]
    weight = found["weight"]
    assert weight.positions().tolist() == [0, 5, 7]
    assert weight.positions().dtype == torch.int64
    assert torch.equal(weight.values, dense.view(-1)[[0, 5, 7]])
    assert (weight.name, weight.shape, weight.numel, weight.nnz) == ("weight", (3, 4), 12, 3)
    assert weight.values is layer.values
    assert repr(weight) == "SparseWeight('weight', shape=(3, 4), nnz=3)"
    assert [(name, p.shape) for name, p in layer.named_parameters()] == [("bias", (3,)), ("values", (3,))]


def test_sparse_weights_come_in_the_order_of_the_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 1), nn.Linear(4, 4))
    chosen = sparsify_(model, {"2.weight": torch.arange(3), "1.weight": torch.arange(2)})
    assert list(chosen) == ["1.weight", "2.weight"]
    sparsify_(model, {"0.weight": torch.arange(1)})
    found = sparse_weights(model)
    assert {name: weight.nnz for name, weight in found.items()} == {
        "0.weight": 1,
        "1.weight": 2,
        "2.weight": 3,
    }
    assert all(isinstance(weight, SparseWeight) and weight.name == name for name, weight in found.items())


def test_a_layer_that_is_called_twice_adds_up_its_gradient() -> None:
    model = Shared().double()
    reference = Shared().double()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference.first.weight.view(-1)[5:] = 0
    sparsify_(model, {"first.weight": torch.arange(5)})
    x = torch.randn(2, 4, dtype=torch.float64)
    for module in (model, reference):
        module(x).pow(2).sum().backward()
    torch.testing.assert_close(model.first.values.grad, reference.first.weight.grad.view(-1)[:5])
    assert list(sparse_weights(model)) == ["first.weight"]


@pytest.mark.parametrize("names", [["second.weight"], ["first.weight", "second.weight"]])
def test_one_layer_has_one_name(names: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"names 'second.weight', but the layer's first name is 'first.weight'"
    ):
        sparsify_(Shared(), {name: torch.arange(5) for name in names})


class _KnowsItsCodes(torch.optim.SGD):
    def reindex_state(self, parameter: Tensor, source: Tensor) -> None:
        raise AssertionError("never asked")


def test_sharded_weights_are_refused_and_sharded_values_keep_their_number(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        layer = nn.Linear(4, 3)
        whole = layer.weight
        layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]))
        with pytest.raises(
            ValueError, match=r"this weight is a DTensor. Make it sparse before it is sharded"
        ):
            sparsify_(layer, {"weight": torch.arange(5)})
        layer.weight = whole
        weight = sparsify_(layer, {"weight": torch.arange(5)})["weight"]
        layer.values = nn.Parameter(distribute_tensor(layer.values, mesh, [Shard(0)]))
        everything = torch.ones(5, dtype=torch.bool)
        with pytest.raises(TypeError, match=r"number of values of 'weight', .* but got 6 for 5\. Grow as"):
            weight.replace(everything, torch.tensor([7]))
        optimizer = torch.optim.SGD([weight.values], momentum=0.9)
        other = _KnowsItsCodes([weight.values])
        kept, grown = everything.clone().index_fill_(0, torch.tensor([1]), False), torch.tensor([7])
        with pytest.raises(TypeError, match=r"state of _KnowsItsCodes cannot follow .* shards of ranks"):
            weight.replace(kept, grown, [optimizer, other])
        optimizer.state[weight.values]["momentum_buffer"] = torch.ones(5)  # whole, beside values that are not
        with pytest.raises(TypeError, match=r"state 'momentum_buffer' of SGD \(Tensor of shape \(5,\)"):
            weight.replace(kept, grown, [optimizer])
        assert weight.positions().tolist() == [0, 1, 2, 3, 4]
        values, before = weight.values, weight.values.full_tensor().detach().clone()
        moments = distribute_tensor(torch.arange(5.0), mesh, [Shard(0)])
        optimizer.state[weight.values]["momentum_buffer"] = moments
        weight.replace(kept, grown, [optimizer])
        assert weight.values is values
        assert weight.positions().tolist() == [0, 2, 3, 4, 7]
        assert torch.equal(weight.values.full_tensor(), torch.cat([before[kept], torch.zeros(1)]))
        assert moments.full_tensor().tolist() == [0, 2, 3, 4, 0]
        dense = export_dense(layer)["weight"]
        assert type(dense) is torch.Tensor
        assert torch.equal(dense.flatten()[weight.positions()], weight.values.full_tensor())
    finally:
        distributed.destroy_process_group()


def test_hooks_and_mode_stay() -> None:
    layer, seen = nn.Linear(4, 3).eval(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    sparsify_(layer, {"weight": torch.arange(5)})
    layer(torch.ones(1, 4))
    assert seen == [1]
    assert not layer.training
