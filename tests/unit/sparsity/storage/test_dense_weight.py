"""`layer.weight` of a sparse layer: asked for its form it makes nothing, asked for numbers it is dense."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_memtrain import MemoryLedger, sparsify_
from lightning_memtrain.sparsity.storage.patterns import Storage
from tests.helpers.sparse import mask_of

STORAGES: tuple[Storage, ...] = ("bitmask", "int32", "block16")
WIDTH, NNZ = 256, 6000


def sparse_and_dense(
    storage: Storage = "int32", width: int = WIDTH, nnz: int = NNZ
) -> tuple[Any, nn.Linear, Tensor]:
    torch.manual_seed(0)
    dense = nn.Linear(width, width, bias=False)
    positions = torch.randperm(width * width)[:nnz].sort().values
    with torch.no_grad():
        dense.weight[mask_of(positions, dense.weight) == 0] = 0.0
    layer = copy.deepcopy(dense)
    sparsify_(layer, {"weight": positions}, storage=storage)
    return layer, dense, positions


ATTRIBUTES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda w: w.shape,
    "size": lambda w: (w.size(), w.size(0)),
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "requires_grad": lambda w: w.requires_grad,
    "flags": lambda w: (w.is_cuda, w.is_meta, w.is_sparse, w.is_quantized, w.layout, w.is_contiguous()),
    "counts": lambda w: (w.dim(), w.ndim, w.numel(), w.nelement(), len(w), w.nbytes, w.element_size()),
    "strides": lambda w: (w.stride(), w.storage_offset()),
    "floating point": lambda w: (w.is_floating_point(), w.is_complex()),
    "views": lambda w: (w.t().stride(), w[3:5].storage_offset(), w.view(-1).shape, w.chunk(2)[1].shape),
    "what it is like": lambda w: (w.detach().shape, w.data.dtype, torch.ones(1).double().type_as(w).dtype),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_asking_for_its_form_makes_no_byte(name: str, storage: Storage) -> None:
    layer, dense, _ = sparse_and_dense(storage)
    with MemoryLedger(layer) as ledger:
        start_bytes = ledger.current_bytes
        found = ATTRIBUTES[name](layer.weight)
    assert found == ATTRIBUTES[name](dense.weight)
    # What `type_as` makes of one number is not the weight's.
    assert ledger.breakdown().peak_bytes - start_bytes <= 12
    assert start_bytes == layer.values.nbytes + layer.sparsity_pattern.nbytes


@pytest.mark.parametrize("make", [torch.zeros_like, torch.empty_like, lambda w: w.new_ones(3)])
def test_a_tensor_like_it_is_made_without_it(make: Callable[[Tensor], Tensor]) -> None:
    layer, dense, _ = sparse_and_dense()
    with MemoryLedger(layer) as ledger:
        start_bytes = ledger.current_bytes
        made = make(layer.weight.detach())
    assert type(made) is Tensor
    assert (made.shape, made.stride(), made.dtype) == (
        (like := make(dense.weight.detach())).shape,
        like.stride(),
        like.dtype,
    )
    assert ledger.breakdown().peak_bytes - start_bytes == made.nbytes + 4


class Reads(nn.Module):
    """Takes the weight of its layer without calling it, as attention does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def test_no_dense_weight_is_kept_between_forward_and_backward() -> None:
    layer, dense, positions = sparse_and_dense()
    model, x = Reads(layer), torch.randn(4, WIDTH, requires_grad=True)
    with MemoryLedger(model, inputs=x) as ledger:
        output = model(x)
        held_bytes = ledger.current_bytes
        output.square().sum().backward()
    assert held_bytes == 4 * NNZ + 4 * NNZ + x.nbytes + output.nbytes
    assert ledger.breakdown().peak_bytes > held_bytes + 4 * WIDTH**2
    gradient, x.grad = x.grad, None
    F.linear(x, dense.weight).square().sum().backward()
    assert torch.equal(gradient, x.grad)
    assert torch.equal(layer.values.grad, dense.weight.grad.view(-1)[positions])


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "product": lambda x, w: x @ w.t(),
    "its transpose": lambda x, w: x @ w,
    "rows": lambda x, w: x @ w[3:50].t(),
    "one row": lambda x, w: x @ w[3],
    "rows by number": lambda x, w: x @ w[torch.tensor([5, 3, 5])].t(),
    "chunks": lambda x, w: torch.cat([x @ part.t() for part in w.chunk(3)], 1),
    "unbound": lambda x, w: torch.stack([x @ row for row in w.unbind(0)[:4]]),
    "another shape": lambda x, w: (x.sum() * w.view(4, -1)).sum(1),
    "reshaped": lambda x, w: (x.sum() * w.t().reshape(-1)).square(),
    "in double": lambda x, w: x.double() @ w.double(),
    "strided": lambda x, w: x.sum() * w.as_strided((4, 4), (WIDTH, 2), 3),
    "twice": lambda x, w: x @ w @ w.t(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "norm": lambda x, w: x.sum() * torch.linalg.vector_norm(w),
    "checkpointed": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", USES)
def test_operators_see_the_dense_weight(name: str, storage: Storage) -> None:
    layer, dense, positions = sparse_and_dense(storage)
    outputs, gradients = [], []
    for module in (layer, dense):
        torch.manual_seed(1)
        x = torch.randn(4, WIDTH, requires_grad=True)
        outputs.append(USES[name](x, module.weight))
        outputs[-1].square().sum().backward()
        gradients.append(x.grad)
    assert type(outputs[0]) is Tensor
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)
    assert torch.equal(layer.values.grad, dense.weight.grad.view(-1)[positions])
    with torch.inference_mode():
        assert torch.equal(USES[name](x, layer.weight), outputs[1])


class Scaled(torch.autograd.Function):
    """Somebody's own function, which no operator of torch stands before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


def test_a_function_of_somebody_elses() -> None:
    layer, dense, positions = sparse_and_dense()
    x = torch.randn(4, WIDTH)
    for module in (layer, dense):
        Scaled.apply(x, module.weight).sum().backward()
    assert torch.equal(layer.values.grad, dense.weight.grad.view(-1)[positions])


def test_second_gradients() -> None:
    layer, dense, positions = sparse_and_dense(width=16, nnz=60)
    gradients = []
    for module in (layer, dense):
        torch.manual_seed(1)
        x, stored = torch.randn(4, 16, requires_grad=True), getattr(module, "values", dense.weight)
        output = F.linear(x, module.weight).pow(3).sum()
        torch.autograd.grad(output, x, create_graph=True)[0].pow(2).sum().backward()
        gradients.append(stored.grad.view(-1))
    torch.testing.assert_close(gradients[0], gradients[1][positions])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("everything", [False, True])
def test_fake_tensors(storage: Storage, everything: bool) -> None:
    layer, _, _ = sparse_and_dense(storage)
    mode = FakeTensorMode(allow_non_fake_inputs=not everything)
    if everything:
        layer.values = nn.Parameter(mode.from_tensor(layer.values.detach()))
        layer.sparsity_pattern = mode.from_tensor(layer.sparsity_pattern)
    model = Reads(layer)
    with mode:
        assert layer.weight.dtype == torch.float32
        x = torch.randn(4, WIDTH, requires_grad=True)
        output = model(x)
        output.sum().backward()
        with torch.no_grad():
            layer.weight[3].mul_(2.0)
    assert type(output) is type(layer.values.grad) is type(x.grad) is FakeTensor
    assert layer.values.grad.shape == (NNZ,)
    assert output.shape == x.grad.shape == (4, WIDTH)
    layer.values.grad = None
    if not everything:
        assert type(model(torch.randn(4, WIDTH))) is Tensor


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(16, 2, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
    "decoder layer": lambda: nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_in_every_mode(name: str, training: bool, context: Any) -> None:
    torch.manual_seed(0)
    sparse = ATTENTION[name]()
    names = [key for key, _ in sparse.named_parameters() if key.endswith("out_proj.weight")]
    positions = {key: torch.randperm(256)[:64] for key in names}
    dense = copy.deepcopy(sparse)
    with torch.no_grad():
        for key, chosen in positions.items():
            dense.get_parameter(key).mul_(mask_of(chosen, dense.get_parameter(key)))
    sparsify_(sparse, positions)
    x, outputs = torch.randn(2, 5, 16), []
    for module in (sparse, dense):
        module.train(training)
        arguments = {"attention": (x, x, x), "decoder layer": (x, x)}.get(name, (x,))
        with context():
            output = module(*arguments)
        outputs.append(output[0] if name == "attention" else output)
    torch.testing.assert_close(*outputs)  # in evaluation, torch has another kernel for the dense one


def test_copies_and_pickles_are_parameters_of_their_own() -> None:
    layer, dense, _ = sparse_and_dense()
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer.weight),
        copy.copy(layer.weight),
        pickle.loads(pickle.dumps(layer.weight)),
        torch.load(file, weights_only=True),
    ]
    for one in copies:
        assert type(one) is nn.Parameter
        assert one.requires_grad
        assert torch.equal(one, dense.weight)
        with torch.no_grad():
            one.zero_()
    layer.requires_grad_(False)
    assert not copy.deepcopy(layer.weight).requires_grad
    twice = copy.deepcopy([weight := layer.weight, weight])
    assert twice[0] is twice[1]
    assert type(copy.deepcopy(layer.weight.detach())) is Tensor
    assert torch.equal(layer.weight, dense.weight)


def test_a_module_that_holds_on_to_it_is_copied() -> None:
    layer, dense, _ = sparse_and_dense()
    model = Reads(layer)
    model.held = layer.weight
    twin = copy.deepcopy(model)
    assert torch.equal(twin.held, dense.weight)
    assert torch.equal(twin.layer.weight, dense.weight)


def test_bytes_for_code_that_takes_them() -> None:
    layer, dense, _ = sparse_and_dense(width=4, nnz=5)
    weight = layer.weight
    assert weight.tolist() == dense.weight.tolist()
    assert (weight.detach().numpy() == dense.weight.detach().numpy()).all()
    assert weight.data_ptr() == weight._plain_copy.data_ptr()
    assert weight.untyped_storage().nbytes() == 64
    assert torch.from_dlpack(weight.detach()).tolist() == dense.weight.tolist()
    numbers = repr(dense.weight).removeprefix("Parameter containing:\n").removesuffix(", requires_grad=True)")
    assert repr(weight) == f"{numbers}, grad_fn=<CloneBackward0>)"
    with pytest.raises(RuntimeError, match="Can't call numpy"):
        weight.numpy()


def test_what_a_parameter_is_asked_for_is_asked_of_the_values() -> None:
    layer, dense, positions = sparse_and_dense(width=8, nnz=20)
    assert layer.weight.grad is None
    for module in (layer, dense):
        module(torch.ones(2, 8)).square().sum().backward()
    masked = torch.zeros(64).index_put_((positions,), dense.weight.grad.view(-1)[positions]).view(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer.weight.grad, masked)
        layer.weight.grad.mul_(2)
        assert torch.equal(layer.values.grad, 2 * masked.view(-1)[positions])
        layer.weight.grad = dense.weight.grad
        assert torch.equal(layer.values.grad, masked.view(-1)[positions])
        layer.weight.grad = None
    assert layer.values.grad is None
    layer.weight.requires_grad_(False)
    assert not layer.values.requires_grad
    layer.weight.requires_grad = True
    assert layer.values.requires_grad


def test_what_is_written_in_inference_mode_is_stored_and_a_copy_is_not() -> None:
    layer, dense, positions = sparse_and_dense(width=8, nnz=20)
    with torch.inference_mode():
        layer.weight.t().reshape(-1).mul_(2)  # a copy, since the transpose has no such view
        assert torch.equal(layer.weight, dense.weight)
        layer.weight.view(-1).mul_(2)
        torch.add(layer.weight.clone(), 1, out=layer.weight)
        torch._foreach_mul_([layer.weight, layer.weight.detach()[:0]], 3)
    assert torch.equal(layer.values.detach(), (3 * (2 * dense.weight.detach() + 1)).view(-1)[positions])


def test_a_weight_that_changed_before_its_backward_is_refused() -> None:
    layer, _, _ = sparse_and_dense()
    x = torch.randn(4, WIDTH, requires_grad=True)
    for change in (lambda: layer.weight.mul_(2), lambda: layer.values.mul_(2)):
        output = F.linear(x, layer.weight).sum()
        with torch.no_grad():
            change()
        with pytest.raises(RuntimeError, match=r"sparse layer of shape \(256, 256\), has been modified"):
            output.backward()


def test_its_shape_is_refused_to_change() -> None:
    layer, dense, _ = sparse_and_dense()
    with pytest.raises(RuntimeError, match=r"must keep its shape \(256, 256\), but got aten.t_"):
        layer.weight.data.t_()
    assert torch.equal(layer.weight, dense.weight)


def test_gradients_of_functions_through_attention() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    sparsify_(attention, {"out_proj.weight": torch.arange(20)})
    x, state = torch.randn(5, 2, 8), dict(attention.named_parameters())

    def loss(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(attention, state, (x, x, x))[0].pow(2).sum()

    gradients = torch.func.grad(loss)(state)
    loss(state).backward()
    for name, parameter in state.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_compiled_function_takes_it() -> None:
    layer, dense, positions = sparse_and_dense()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: (x @ w.t()).relu(), backend="aot_eager")
    x = torch.randn(4, WIDTH)
    for module in (layer, dense):
        compiled(x, module.weight).sum().backward()
    torch.testing.assert_close(layer.values.grad, dense.weight.grad.view(-1)[positions])
