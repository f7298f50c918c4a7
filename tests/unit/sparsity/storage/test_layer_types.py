"""Each sparse layer multiplies as its dense layer does, forwards, backwards and twice backwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain import MemoryLedger, sparsify_
from lightning_memtrain.core import Category
from tests.helpers.sparse import mask_of

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 20), (5, 12)),
    "linear, no bias": (nn.Linear(12, 20, bias=False), (5, 12)),
    "linear, three axes": (nn.Linear(12, 20), (2, 3, 12)),
    "linear, three axes, no bias": (nn.Linear(12, 20, bias=False), (2, 3, 12)),
    "linear, one axis": (nn.Linear(12, 20), (12,)),
    "linear, empty batch": (nn.Linear(12, 20), (0, 12)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 7, 7)),
    "conv2d, groups and dilation": (nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2), (2, 4, 9, 8)),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    "conv2d, reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 7, 7)),
    "conv2d, circular same": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 7, 7)),
    "conv2d, same": (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 9, 9)),
    "conv2d, same, even": (nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 9, 9)),
    "conv2d, valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 7)),
    "conv2d, one image": (nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "conv2d, empty batch": (nn.Conv2d(4, 6, 3), (0, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1), (2, 2, 5, 5, 5)),
    "conv transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 7)),
    "conv transpose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 6, 6),
    ),
    "conv transpose3d": (nn.ConvTranspose3d(2, 4, 2, stride=2, dilation=2), (1, 2, 4, 4, 4)),
}


def sparse_and_dense(
    layer: nn.Module, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    dense = copy.deepcopy(layer).to(dtype)
    positions = torch.randperm(dense.weight.numel())[: dense.weight.numel() // 3]
    with torch.no_grad():
        dense.weight.mul_(mask_of(positions, dense.weight))
    sparse = copy.deepcopy(dense)
    sparsify_(sparse, {"weight": positions}, **options)
    return sparse, dense, positions.sort().values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_dense_layer(name: str, dtype: torch.dtype) -> None:
    layer, shape = CASES[name]
    sparse, dense, positions = sparse_and_dense(layer, dtype)
    results = []
    for module in (sparse, dense):
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        output = module(x)
        output.backward(torch.randn_like(output))
        bias = getattr(module, "bias", None)
        results.append((output.detach(), x.grad, None if bias is None else bias.grad))
    compare = torch.equal if len(shape) > 1 else torch.allclose  # one axis goes as a batch of one
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None and theirs is None) or compare(ours, theirs)
    assert compare(sparse.values.grad, dense.weight.grad.view(-1)[positions])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
def test_second_gradients(name: str) -> None:
    layer, shape = CASES[name]
    if 0 in shape:
        pytest.skip("no numbers")
    sparse, dense, positions = sparse_and_dense(layer, torch.float64)
    seconds = []
    for module in (sparse, dense):
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        stored = module.values if module is sparse else module.weight
        firsts = torch.autograd.grad(module(x).pow(3).sum(), (x, stored), create_graph=True)
        firsts[0].pow(2).sum().backward()
        seconds.append((x.grad, stored.grad))
    torch.testing.assert_close(seconds[0][0], seconds[1][0])
    torch.testing.assert_close(seconds[0][1], seconds[1][1].view(-1)[positions])


def test_the_numerical_gradient() -> None:
    sparse, _, _ = sparse_and_dense(nn.Linear(6, 16), torch.float64, chunk_bytes=6 * 8 * 8)
    assert len(sparse.spans) == 2
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(sparse, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, sparse.values, sparse.bias))
    assert torch.autograd.gradgradcheck(function, (x, sparse.values, sparse.bias))


@pytest.mark.parametrize("storage", ["bitmask", "int32", "block16"])
@pytest.mark.parametrize("out_features", [5, 8, 60, 64])
@pytest.mark.parametrize("chunk_bytes", [1, 12 * 4 * 16, 10**9])
def test_chunks_of_rows_change_no_gradient_but_by_rounding(
    storage: Any, out_features: int, chunk_bytes: int
) -> None:
    layer = nn.Linear(12, out_features)
    sparse, dense, positions = sparse_and_dense(
        layer, torch.float64, storage=storage, chunk_bytes=chunk_bytes
    )
    rows = {1: 8, 12 * 4 * 16: 8, 10**9: out_features}[chunk_bytes]
    assert len(sparse.spans) == -(-out_features // rows)
    gradients = []
    for module in (sparse, dense):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
        output = module(x)
        output.backward(torch.randn_like(output))
        gradients.append((output.detach(), x.grad, module.bias.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sparse.values.grad, dense.weight.grad.view(-1)[positions])


def test_repr_says_what_is_stored() -> None:
    sparse, _, _ = sparse_and_dense(nn.Conv2d(4, 6, 3), storage="int32")
    assert repr(sparse) == "SparseConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), nnz=72, storage='int32')"


def test_its_dense_weight_can_be_read_and_has_a_gradient() -> None:
    sparse, dense, positions = sparse_and_dense(nn.Linear(6, 4))
    assert torch.equal(sparse.weight, dense.weight)
    assert sparse.weight.shape == (4, 6)
    x = torch.randn(3, 6)
    for module in (sparse, dense):
        nn.functional.linear(x, module.weight).sum().backward()
    assert torch.equal(sparse.values.grad, dense.weight.grad.view(-1)[positions])


def test_what_is_written_into_the_dense_weight_is_stored() -> None:
    sparse, _, positions = sparse_and_dense(nn.Linear(6, 4))

    def stored(expected: Tensor) -> bool:
        return torch.equal(sparse.values, expected.reshape(-1)[positions])

    torch.manual_seed(2)
    nn.init.xavier_normal_(sparse.weight)
    torch.manual_seed(2)
    assert stored(nn.init.xavier_normal_(torch.empty(4, 6)))
    sparse.weight.data.fill_(3.0)
    assert stored(torch.full((4, 6), 3.0))
    with torch.no_grad():
        sparse.weight[1] = 5.0
        sparse.weight.t()[0].mul_(2.0)
    expected = torch.full((4, 6), 3.0)
    expected[1] = 5.0
    expected[:, 0] *= 2.0
    assert stored(expected)
    torch.manual_seed(3)
    sparse.reset_parameters()
    torch.manual_seed(3)
    dense = nn.Linear(6, 4)
    assert stored(dense.weight)
    assert torch.equal(sparse.bias, dense.bias)


def test_writing_where_gradients_are_recorded_is_refused_as_for_a_dense_weight() -> None:
    sparse, _, _ = sparse_and_dense(nn.Linear(6, 4))
    before = sparse.values.clone()
    with pytest.raises(
        RuntimeError, match=r"in place where gradients are recorded\. Change it under `torch.no_grad"
    ):
        sparse.weight.mul_(2.0)
    assert torch.equal(sparse.values, before)


def test_apply_initialises_sparse_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 2, 1))
    sparsify_(model, {"0.weight": torch.arange(5), "1.weight": torch.arange(3)})
    model.apply(lambda module: hasattr(module, "weight") and nn.init.constant_(module.weight, 0.25))
    assert torch.equal(model[0].values, torch.full((5,), 0.25))
    assert torch.equal(model[1].values, torch.full((3,), 0.25))


def test_frozen_layers_pass_the_gradient_on() -> None:
    sparse, dense, _ = sparse_and_dense(nn.Linear(6, 4))
    for module in (sparse, dense):
        module.requires_grad_(False)
    gradients = []
    for module in (sparse, dense):
        x = torch.ones(3, 6, requires_grad=True)
        module(x).pow(2).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert sparse.values.grad is None


def test_it_stays_frozen_when_it_becomes_sparse() -> None:
    layer = nn.Linear(6, 4).requires_grad_(False)
    sparsify_(layer, {"weight": torch.arange(3)})
    assert not layer.values.requires_grad


def test_deterministic_mode() -> None:
    sparse, dense, _ = sparse_and_dense(nn.Conv2d(4, 6, 3))
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(2, 4, 7, 7)
        assert torch.equal(sparse(x), dense(x))
        sparse(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("numel_kept", [0, 24])
def test_nothing_and_everything_stored(numel_kept: int) -> None:
    layer = nn.Linear(6, 4)
    dense = copy.deepcopy(layer)
    sparsify_(layer, {"weight": torch.arange(numel_kept)})
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.values.grad.shape == (numel_kept,)
    assert torch.equal(layer(x), dense(x) if numel_kept else dense.bias.expand(3, 4))


def test_multihead_attention_uses_a_sparse_output_projection() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    positions = torch.randperm(64)[:20]
    dense = copy.deepcopy(attention)
    with torch.no_grad():
        dense.out_proj.weight.mul_(mask_of(positions, dense.out_proj.weight))
    sparsify_(attention, {"out_proj.weight": positions})
    x = torch.randn(2, 5, 8)
    for module in (attention, dense):
        module(x, x, x)[0].pow(2).sum().backward()
    assert torch.equal(attention(x, x, x)[0], dense(x, x, x)[0])
    assert torch.equal(
        attention.out_proj.values.grad, dense.out_proj.weight.grad.view(-1)[positions.sort().values]
    )


def test_under_autocast_no_weight_is_kept_for_backward() -> None:
    sparse, _, _ = sparse_and_dense(nn.Linear(256, 256))
    x = torch.randn(4, 256)
    with MemoryLedger(sparse, inputs=x) as ledger:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = sparse(x)
        held = ledger.current_bytes
    del output
    of_model = sum(tensor.nbytes for tensor in (*sparse.parameters(), *sparse.buffers()))
    # The input, its copy in half precision, and the output. Tables of one byte's bits come to 5376 bytes.
    assert held == of_model + x.nbytes + x.nbytes // 2 + 4 * 256 * 2 + 5376
    assert ledger.breakdown().maxima[Category.PARAMETERS] == sparse.values.nbytes + sparse.bias.nbytes


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
def test_results_can_be_changed_in_place(name: str) -> None:
    layer, shape = CASES[name]
    sparse, dense, positions = sparse_and_dense(layer)
    x = torch.randn(shape)
    for module in (sparse, dense):
        output = module(x)
        output *= 0.5
        output.square().sum().backward()
    assert torch.equal(sparse.values.grad, dense.weight.grad.flatten()[positions])
