"""Sparse layers are copied, saved, loaded, moved and compiled like any other module."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memtrain import MemoryLedger, sparsify_
from lightning_memtrain.core import Category
from lightning_memtrain.sparsity import dense_state_dict, export_dense, sparse_weights
from lightning_memtrain.sparsity.storage.checkpoint_key import with_checkpoint_key
from lightning_memtrain.sparsity.storage.patterns import Storage
from tests.helpers.sparse import MODELS, assert_equal_states, model_and_batch, random_positions


# Of torch.compile itself, which pytest would make errors of.
def tracing(test: Any) -> Any:
    for message in ("should not be instantiated", "The .grad attribute of a Tensor that is not a leaf"):
        test = pytest.mark.filterwarnings(f"ignore:.*{message}")(test)
    return test


STORAGES: tuple[Storage, ...] = ("bitmask", "int32", "block16")


def sparse_model(name: str, sparsity: float = 0.8, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    model, batch, labels = model_and_batch(name)
    sparsify_(model, random_positions(model, sparsity), **options)
    return model, batch, labels


def through_a_file(saved: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("name", MODELS)
def test_a_deep_copy_has_values_of_its_own(name: str) -> None:
    model, batch, _ = sparse_model(name)
    model.eval()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch), model(batch))
    with torch.no_grad():
        for weight in sparse_weights(twin).values():
            weight.values.zero_()
    assert all(weight.values.abs().sum() > 0 for weight in sparse_weights(model).values())


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_through_a_file(name: str) -> None:
    model, batch, _ = sparse_model(name, chunk_bytes=512)
    model.eval()
    loaded = through_a_file(model, weights_only=False)
    assert torch.equal(loaded(batch), model(batch))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("saved_storage", STORAGES)
@pytest.mark.parametrize("assign", [False, True])
def test_state_of_another_number_of_entries_is_loaded(
    storage: Storage, saved_storage: Storage, assign: bool
) -> None:
    saved, batch, _ = sparse_model("transformer", 0.5, storage=saved_storage)
    model, _, _ = sparse_model("transformer", 0.9, storage=storage, chunk_bytes=1024)
    parameters = dict(model.named_parameters())
    state = through_a_file(saved.state_dict(), weights_only=True)
    model.load_state_dict(state, assign=assign)
    assert assign or all(parameters[name] is p for name, p in model.named_parameters())
    dtypes = {"bitmask": torch.uint8, "int32": torch.int32, "block16": torch.int16}
    assert all(
        weight.layer.sparsity_pattern.dtype == dtypes[storage] for weight in sparse_weights(model).values()
    )
    torch.testing.assert_close(model(batch), saved(batch))
    assert_equal_states(export_dense(model), export_dense(saved))
    for ours, theirs in zip(sparse_weights(model).values(), sparse_weights(saved).values(), strict=True):
        assert torch.equal(ours.positions(), theirs.positions())
    model(batch).sum().backward()


def test_the_order_of_saved_positions_is_that_of_the_values() -> None:
    layer = nn.Linear(4, 3)
    sparsify_(layer, {"weight": torch.tensor([9, 1])}, storage="int32")
    assert {key: value.dtype for key, value in layer.state_dict().items()} == {
        "bias": torch.float32,
        "values": torch.float32,
        "sparsity_pattern": torch.int32,
    }
    assert layer.state_dict()["sparsity_pattern"].tolist() == [1, 9]


DAMAGED: dict[str, tuple[dict[str, Tensor], str]] = {
    "of another model": (
        {"values": torch.ones(3), "sparsity_pattern": torch.zeros(100, dtype=torch.uint8)},
        r"has 100 bytes, which is no bitmask pattern of 3 of the 12 entries .* \(3, 4\). Was it saved from",
    ),
    "too few bits": (
        {"values": torch.ones(3), "sparsity_pattern": torch.tensor([1, 1], dtype=torch.uint8)},
        "has 2 positions for 3 values: it is damaged",
    ),
    "descending": (
        {"values": torch.ones(2), "sparsity_pattern": torch.tensor([3, 1], dtype=torch.int32)},
        "positions that do not ascend from 0 to 11: it is damaged",
    ),
    "out of range": (
        {"values": torch.ones(2), "sparsity_pattern": torch.tensor([3, 12], dtype=torch.int32)},
        "positions that do not ascend from 0 to 11: it is damaged",
    ),
    "no pattern": (
        {"values": torch.ones(2), "sparsity_pattern": torch.tensor([3.0, 12.0])},
        "must be uint8, int16 or int32 with values of one axis, but got torch.float32",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pattern_is_not_loaded(name: str) -> None:
    state, message = DAMAGED[name]
    layer = nn.Linear(4, 3, bias=False)
    sparsify_(layer, {"weight": torch.arange(5)})
    before = export_dense(layer)["weight"]
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(export_dense(layer)["weight"], before)


def test_a_dense_checkpoint_is_not_loaded_into_sparse_layers() -> None:
    model, _, _ = sparse_model("mlp")
    dense, _, _ = model_and_batch("mlp")
    with pytest.raises(
        RuntimeError, match=r'"0.weight" is dense in the checkpoint, but this layer is sparse. Load'
    ):
        model.load_state_dict(dense.state_dict())


def test_a_sparse_checkpoint_says_what_it_is_to_a_dense_model() -> None:
    model, _, _ = sparse_model("mlp")
    dense, _, _ = model_and_batch("mlp")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.values", "0.sparsity_pattern"'):
        dense.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_export_loads_into_the_dense_class_and_computes_the_same(name: str) -> None:
    model, batch, _ = sparse_model(name)
    dense, _, _ = model_and_batch(name)
    exported = through_a_file(export_dense(model), weights_only=True)
    assert exported.keys() == dense.state_dict().keys()
    dense.load_state_dict(exported, strict=True)
    assert torch.equal(dense.eval()(batch), model.eval()(batch))
    assert all(type(value) is Tensor for value in exported.values())


def test_the_export_of_a_dense_model_is_its_state() -> None:
    model, _, _ = model_and_batch("mlp")
    assert_equal_states(export_dense(model), model.state_dict())


def test_export_of_a_shared_layer_and_of_a_compiled_model() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)

    model, dense = Shared(), Shared()
    sparsify_(model, {"first.weight": torch.arange(5)})
    dense.load_state_dict(export_dense(model))
    compiled = torch.compile(model, backend="eager")
    assert_equal_states(export_dense(compiled), dense.state_dict())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_saved_is_made_dense(name: str, storage: Storage) -> None:
    model, _, _ = sparse_model(name, storage=storage)
    dense, _, _ = model_and_batch(name)
    saved = through_a_file(with_checkpoint_key(model.state_dict()), weights_only=True)
    made = dense_state_dict(saved, dense)
    assert_equal_states(made, export_dense(model))
    assert all(type(value) is Tensor for value in made.values())
    dense.load_state_dict(made, strict=True)
    assert_equal_states(dense_state_dict(made, dense), made)


def test_what_was_saved_keeps_its_dtype_when_it_is_made_dense() -> None:
    layer = nn.Linear(3, 4).to(torch.bfloat16)
    sparsify_(layer, {"weight": torch.tensor([2, 7, 11])})
    assert_equal_states(dense_state_dict(layer.state_dict(), nn.Linear(3, 4)), export_dense(layer))


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pattern_is_not_made_dense(name: str) -> None:
    state, message = DAMAGED[name]
    with pytest.raises(ValueError, match=f"'values' of a sparse layer, but their pattern .*{message}"):
        dense_state_dict(state, nn.Linear(4, 3, bias=False))


def test_without_a_dense_weight_there_is_no_telling_the_shape() -> None:
    model, _, _ = sparse_model("mlp")
    message = (
        r"holds '0.values' of a sparse layer, but the Linear has no dense '0.weight'. Pass the model that"
    )
    with pytest.raises(ValueError, match=message):
        dense_state_dict(model.state_dict(), nn.Linear(2, 2))


def test_other_dtypes_and_devices() -> None:
    model, batch, _ = sparse_model("mlp")
    patterns = [weight.layer.sparsity_pattern.clone() for weight in sparse_weights(model).values()]
    expected = export_dense(model)["0.weight"].double()
    model.double()
    assert torch.equal(export_dense(model)["0.weight"], expected)
    assert model(batch.double()).dtype == torch.float64
    assert all(
        torch.equal(weight.layer.sparsity_pattern, pattern)
        for weight, pattern in zip(sparse_weights(model).values(), patterns, strict=True)
    )
    moved = model.to("meta")
    assert moved(batch.double().to("meta")).shape == (8, 10)
    restored = moved.to_empty(device="cpu")
    fresh, _, _ = sparse_model("mlp")
    restored.load_state_dict(fresh.state_dict())
    assert torch.equal(export_dense(restored)["0.weight"], expected)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("chunk_bytes", [None, 2048])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_without_data_counts_the_same_bytes(
    name: str, chunk_bytes: int | None, storage: Storage
) -> None:
    peaks = []
    for device in ("cpu", "meta"):
        model, batch, labels = model_and_batch(name)
        positions = random_positions(model)
        model, batch, labels = model.to(device), batch.to(device), labels.to(device)
        sparsify_(model, positions, storage=storage, chunk_bytes=chunk_bytes)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        for _ in range(2):
            with MemoryLedger(model, optimizer, (batch, labels)) as ledger:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch), labels).backward()
                optimizer.step()
        peaks.append(ledger.breakdown())
    real, without = peaks
    assert real.maxima[Category.PARAMETERS] == without.maxima[Category.PARAMETERS]
    assert real.maxima[Category.GRADIENTS] == without.maxima[Category.GRADIENTS]
    assert real.maxima[Category.BUFFERS] == without.maxima[Category.BUFFERS]
    # Tables of 5376 bytes are kept for real devices, and made when they are needed for others.
    assert abs(real.peak_bytes - without.peak_bytes) <= 0.02 * real.peak_bytes + 3 * 5376


def test_positions_without_data() -> None:
    layer = nn.Linear(100, 100, device="meta")
    weight = sparsify_(layer, {"weight": torch.empty(1000, dtype=torch.int64, device="meta")})["weight"]
    assert (weight.nnz, layer.sparsity_pattern.nbytes) == (1000, 1250)
    layer(torch.empty(2, 100, device="meta")).sum().backward()
    assert weight.values.grad.shape == (1000,)


@pytest.mark.parametrize("name", MODELS)
def test_fake_tensors(name: str) -> None:
    model, batch, _ = sparse_model(name)
    fake, mode = copy.deepcopy(model), FakeTensorMode()
    for module in fake.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = mode.from_tensor(buffer)
    fake_batch = mode.from_tensor(batch)
    with mode:
        output = fake(fake_batch)
        output.sum().backward()
    assert output.shape == (len(batch), 10)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fake.parameters())
    assert model(batch).isfinite().all()


@tracing
@pytest.mark.parametrize(
    ("name", "storage", "chunk_bytes"),
    [
        ("mlp", "bitmask", None),
        ("mlp", "int32", None),
        ("mlp", "block16", None),
        ("mlp", "bitmask", 2048),
        ("transformer", "auto", None),
        ("wrn", "auto", None),
    ],
)
def test_compiled_as_one_graph(name: str, storage: Storage, chunk_bytes: int | None) -> None:
    model, batch, labels = sparse_model(name, storage=storage, chunk_bytes=chunk_bytes)
    model.eval()
    gradients = []
    torch._dynamo.reset()
    for module in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        nn.functional.cross_entropy(module(batch), labels).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


@tracing
@pytest.mark.parametrize("storage", ["bitmask", "int32", "block16"])
def test_compiled_twice_for_any_number_of_counts(storage: Storage) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    weight = sparsify_(layer, {"weight": torch.arange(400)}, storage=storage)["weight"]
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for count in range(400, 412):
        gradients = []
        for module in (layer, compiled):
            layer.zero_grad()
            with torch._dynamo.config.patch(force_parameter_static_shapes=False):
                module(x).square().sum().backward()
            gradients.append(weight.values.grad)
        assert weight.nnz == count
        torch.testing.assert_close(*gradients)
        weight.replace(torch.ones(count, dtype=torch.bool), torch.tensor([1000 + count]))
    assert len(graphs) == 2


@tracing
def test_compiled_under_autocast_and_made_sparse_afterwards() -> None:
    model, batch, labels = model_and_batch("mlp")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(batch)
    sparsify_(model, random_positions(model))
    gradients = []
    for module in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(module(batch), labels)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager)


@tracing
def test_a_watched_layer_runs_outside_the_graph() -> None:
    from lightning_memtrain.sparsity import watch_candidates

    model, batch, labels = sparse_model("mlp")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for module in (model, compiled):
        with watch_candidates(sparse_weights(model), {"0.weight": 5, "2.weight": 5}) as watch:
            nn.functional.cross_entropy(module(batch), labels).backward()
        found.append([watch.candidates(name).positions for name in ("0.weight", "2.weight")])
    assert all(torch.equal(eager, ours) for eager, ours in zip(*found, strict=True))
    compiled(batch).sum().backward()


def test_a_weight_that_is_assigned_is_stored() -> None:
    layer = nn.Linear(4, 3)
    sparsify_(layer, {"weight": torch.tensor([1, 6, 11])})
    new = torch.arange(12.0).view(3, 4)
    layer.weight.data = new
    assert layer.values.tolist() == [1, 6, 11]
    layer.weight[1].data = torch.full((4,), 9.0)
    assert layer.values.tolist() == [1, 9, 11]
    with torch.no_grad():
        layer.weight += 1
    assert layer.values.tolist() == [2, 10, 12]
    layer.weight = nn.Parameter(new)
    assert layer.values.tolist() == [1, 6, 11]
    layer.weight = 2 * new
    assert layer.values.tolist() == [2, 12, 22]
    assert [name for name, _ in layer.named_parameters()] == ["bias", "values"]
    assert layer.weight.flatten().nonzero().flatten().tolist() == [1, 6, 11]
    with pytest.raises(ValueError, match=r"must keep its shape \(3, 4\), but got \(4, 3\)"):
        layer.weight.data = new.t()
    with pytest.raises(ValueError, match=r"must be a tensor of shape \(3, 4\), but got \(2,\)"):
        layer.weight = torch.ones(2)
    with pytest.raises(ValueError, match="but got None"):
        layer.weight = None


def test_functional_gradients() -> None:
    layer = nn.Linear(4, 3)
    sparsify_(layer, {"weight": torch.arange(5)})
    x = torch.randn(2, 4)
    state = dict(layer.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).pow(2).sum())(state)
    layer(x).pow(2).sum().backward()
    torch.testing.assert_close(gradient["values"], layer.values.grad)
