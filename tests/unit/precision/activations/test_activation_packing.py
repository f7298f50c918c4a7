"""What the context packs, what it leaves alone, and that backward does not notice more than rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_memtrain as mt
from lightning_memtrain.precision import ActivationCodec
from lightning_memtrain.precision.activations.activation_packing import ActivationPacking, PackedBytes
from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet
from tests.helpers.trainers import assert_torch_is_as_found

MIB = 2**20


def eager(bits: int = 8, **options: Any) -> ActivationCodec:
    return ActivationCodec(bits=bits, compiled=False, **options)  # type: ignore[arg-type]


def mlp(width: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
    )


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient_of(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], packing: ActivationPacking | None
) -> Tensor:
    model.zero_grad()
    if packing is None:
        loss(model).backward()
    else:
        with packing:
            value = loss(model)
        value.backward()
    return gradient(model)


def relative_error(model: nn.Module, loss: Callable[[nn.Module], Tensor], codec: ActivationCodec) -> float:
    state = copy.deepcopy(model.state_dict())
    exact = gradient_of(model, loss, None)
    model.load_state_dict(state)
    rounded = gradient_of(model, loss, codec.packing(model))
    return float((rounded - exact).norm() / exact.norm())


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(1000, 128)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


def image_loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 32, 32, generator=generator)
    return F.cross_entropy(model(images), torch.randint(0, 10, (32,), generator=generator))


def token_loss(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 1000, (16, 65), generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(("bits", "most"), [(8, 0.005), (4, 0.06)])
def test_the_error_of_a_convolutional_networks_gradient(bits: int, most: float) -> None:
    torch.manual_seed(0)
    assert relative_error(WideResNet(depth=16, widen_factor=2), image_loss, eager(bits)) <= most


@pytest.mark.parametrize(("bits", "most"), [(8, 0.0065), (4, 0.09)])
def test_the_error_of_a_transformers_gradient(bits: int, most: float) -> None:
    torch.manual_seed(0)
    assert relative_error(Transformer(), token_loss, eager(bits)) <= most


# Of 65.03 MiB. Backward of the second block's ReLU and batch norm holds 16 MiB whatever the codec does (its
# argument, two gradients, and that of the shortcut), beside 5.3 MiB of weights and gradients.
@pytest.mark.parametrize(("bits", "most_stored_mib", "most_peak_mib"), [(8, 15.36, 29.31), (4, 8.91, 25.73)])
def test_stored_bytes_and_peak_of_a_step(bits: int, most_stored_mib: float, most_peak_mib: float) -> None:
    torch.manual_seed(0)
    model = WideResNet(depth=16, widen_factor=2)
    batch = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    packing = eager(bits).packing(model)
    packing.exclude(batch)
    with mt.MemoryLedger(model, inputs=batch) as ledger:
        with packing:
            loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
    assert packing.last.saved_bytes == 62_930_944
    assert packing.last.stored_bytes == {8: 16_101_472, 4: 9_341_312}[bits]
    assert ledger.breakdown().ledger_peak_bytes <= most_peak_mib * MIB
    # The ledger sees what is kept, by whom, and calls it by its name.
    activations = ledger.breakdown().maxima[mt.core.Category.ACTIVATIONS]
    assert abs(activations - packing.last.stored_bytes) < 0.01 * activations


def test_counts_by_hand() -> None:
    model, x = mlp(), torch.randn(64, 128)
    packing = eager().packing(model)
    with packing:
        model(x)
    # x, ReLU's result (saved by ReLU and by the next layer, stored once), GELU's argument and its result.
    num_groups = 4 * 64 * 128 // 256
    assert packing.last == PackedBytes(4, 4 * 64 * 128 * 4, 4 * 64 * 128 + num_groups * 6)


@pytest.mark.parametrize("batch", [dict, SimpleNamespace])
def test_what_somebody_else_keeps_can_be_spared_for_one_entry(batch: type) -> None:
    model, x = mlp(), torch.randn(64, 128)
    packing = eager().packing(model)
    packing.exclude(batch(images=[x]))
    with packing:
        model(x)
    assert packing.last.num_tensors == 3
    with packing:
        model(x)
    assert packing.last.num_tensors == 4


def test_small_integer_boolean_and_double_tensors_are_stored_as_they_are() -> None:
    packing = eager().packing(nn.Module())
    floats = torch.randn(64, 64, requires_grad=True)
    with packing:
        (floats[:63].exp() * 1).sum()  # 4032 elements
        floats.double().exp()
        F.max_pool2d(floats[None], 2)  # saves indices
        floats[torch.ones(64, 64, dtype=torch.bool)]
    assert packing.last.num_tensors == 1  # max_pool2d saves its argument
    with packing:
        (floats.detach().double().requires_grad_() ** 2).sum()
    assert packing.last.num_tensors == 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_their_views_and_autocasts_copies_are_never_packed(autocast: bool, frozen: bool) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(128, 96), requires_grad=not frozen)
    packing = eager().packing(model)
    x = torch.randn(8, 96, requires_grad=True)  # too small to be packed
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False), packing:
        F.linear(x, model.weight)
        x @ model.weight.t()
        x @ model.weight.view(96, 128)
        if not frozen:  # a part of a frozen weight that autocast copied has nothing to be recognised by
            x[:, :64] @ model.weight[:96].t()[:64]
    assert packing.last.num_tensors == 0


def test_buffers_are_never_packed() -> None:
    model = nn.Module()
    model.register_buffer("table", torch.randn(128, 96))
    packing = eager().packing(model)
    with packing:
        torch.randn(128, 96, requires_grad=True) * model.table
    assert packing.last.num_tensors == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocasts_copies_of_buffers_are_never_packed(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("table", torch.randn(128, 96))
    packing = eager().packing(model)
    x = torch.randn(8, 96, requires_grad=True)  # too small to be packed
    with torch.autocast("cpu", dtype, cache_enabled=False), packing:
        F.linear(x, model.table)
        x @ model.table.t()
    assert packing.last.num_tensors == 0


def test_memory_that_is_used_again_is_not_taken_for_what_was_there_before() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    packing = eager().packing(nn.Module())
    with packing:
        losses = []
        for factor in range(1, 30):  # each exp() frees its memory, which the next one gets
            losses.append((x * factor / 30).exp().sum())
    sum(losses).backward()
    assert packing.last.num_tensors == 29
    expected = sum((x.detach() * f / 30).exp() * f / 30 for f in range(1, 30))
    assert float((x.grad - expected).norm() / expected.norm()) < 0.005


def test_a_tensor_that_was_changed_between_two_saves_is_packed_twice() -> None:
    x = torch.randn(64, 64).requires_grad_()
    y = torch.rand(64, 64) + 1
    packing = eager().packing(nn.Module())
    with packing:
        first = (x * y).sum()
        y.mul_(10)
        second = (x * y).sum()
    assert packing.last.num_tensors == 2
    (first + second).backward()
    assert x.grad is not None
    # Plain autograd refuses this; here the first product has its own copy of y.
    torch.testing.assert_close(x.grad, y * 1.1, rtol=0.01, atol=0)


def test_a_change_in_place_of_a_tensor_stored_as_it_is_raises_as_in_plain_autograd() -> None:
    def run(packing: Any) -> str:
        x = torch.randn(8, requires_grad=True)
        with packing:
            y = x.exp()
        y.mul_(2)
        with pytest.raises(RuntimeError) as caught:
            y.sum().backward()
        return str(caught.value)

    from contextlib import nullcontext

    plain, packed = run(nullcontext()), run(eager().packing(nn.Module()))
    assert packed.startswith(
        "one of the variables needed for gradient computation has been modified by an inplace"
    )
    assert "is at version 1; expected version 0 instead" in packed
    assert plain.partition(":")[0] == packed.partition(":")[0]


def test_a_change_in_place_of_a_packed_tensor_does_no_harm() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with eager().packing(nn.Module()):
        y = x.exp()
        expected = y.detach().clone() * 2
        y.mul_(2)
    y.sum().backward()
    assert float((x.grad - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_all_packed_dtypes(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    x = torch.randn(64, 128).to(dtype)
    assert relative_error(model, lambda m: m(x).float().square().mean(), eager()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(64, 128)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype, cache_enabled=False):
            return model(x).float().square().mean()

    assert relative_error(mlp(), loss, eager()) < 0.02


def test_float64_is_exact() -> None:
    x = torch.randn(64, 128, dtype=torch.float64)
    assert relative_error(mlp().double(), lambda m: m(x).square().mean(), eager()) == 0


def test_nested_in_a_ledger_and_around_one() -> None:
    x = torch.randn(64, 128)
    found = []
    for ledger_inside in (False, True):
        model = mlp()
        packing = eager().packing(model)
        ledger = mt.MemoryLedger(model, inputs=x)
        if ledger_inside:
            with packing, ledger:
                loss = model(x).sum()
        else:
            with ledger, packing:
                loss = model(x).sum()
        loss.backward()
        found.append((packing.last, ledger.breakdown().maxima[mt.core.Category.ACTIVATIONS], gradient(model)))
    assert found[0][0] == found[1][0]
    assert found[0][0].num_tensors == 4
    # The ledger sees the input as one.
    assert found[0][1] == found[1][1] == found[0][0].stored_bytes
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_around_checkpointing_what_checkpoints_keep_is_packed(reentrant: bool) -> None:
    model = mlp()
    x = torch.randn(64, 128, requires_grad=True)

    def loss(module: nn.Module) -> Tensor:
        hidden = module[0](x)
        for layer in (module[1:3], module[3:]):
            hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
        return hidden.sum()

    exact = gradient_of(model, loss, None)
    packing = eager().packing(model)
    rounded = gradient_of(model, loss, packing)
    assert packing.last.num_tensors == 3  # x and the argument of each checkpoint
    assert float((rounded - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_of_a_checkpointed_function_is_refused_with_the_reason(reentrant: bool) -> None:
    model = mlp()
    packing = eager().packing(model)

    def packed(x: Tensor) -> Tensor:
        with packing:
            return model(x)

    x = torch.randn(64, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="entered inside of a checkpointed function") as caught:
        checkpoint(packed, x, use_reentrant=reentrant).sum().backward()
    assert "Enter it outside" in str(caught.value)
    assert_torch_is_as_found(model)


def test_two_contexts_inside_each_other_are_refused() -> None:
    model = mlp()
    packing = eager().packing(model)
    for inner in (packing, eager().packing(model)):
        with packing, pytest.raises(RuntimeError, match="must be entered once at a time"), inner:
            pass
    assert_torch_is_as_found(model)


@pytest.mark.parametrize("inside", [False, True])
def test_under_torch_func_an_error_names_the_codec_and_it_can_be_used_afterwards(inside: bool) -> None:
    model, x = nn.Linear(64, 64), torch.randn(128, 64)
    packing = eager().packing(model)

    def loss(parameters: Any) -> torch.Tensor:
        with packing if inside else nullcontext():
            return torch.func.functional_call(model, parameters, (x,)).exp().sum()

    with (
        pytest.raises(
            RuntimeError,
            match=r"`ActivationCodec.packing` packs by .* refuses under torch.func.grad.*Compute that",
        ),
        nullcontext() if inside else packing,
    ):
        torch.func.grad(loss)(dict(model.named_parameters()))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    with packing:
        torch.func.vmap(model)(x[None]).exp().sum().backward()
    assert packing.last.num_tensors == 2


def test_the_context_is_left_after_an_error_and_can_be_entered_again() -> None:
    model = mlp()
    packing = eager().packing(model)
    with pytest.raises(ValueError, match="mine"), packing:
        raise ValueError("mine")
    assert_torch_is_as_found(model)
    with packing:
        model(torch.randn(64, 128))
    assert packing.last.num_tensors == 4


def test_dropout_draws_what_it_draws_without() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Dropout(0.5), nn.Linear(128, 128), nn.Dropout(0.5))
    x = torch.randn(64, 128)
    torch.manual_seed(1)
    expected, state = model(x), torch.get_rng_state()
    torch.manual_seed(1)
    with eager(4, stochastic=True).packing(model):
        found = model(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_goes_on_from_a_saved_state_and_differs_by_seed_and_rank() -> None:
    x = torch.randn(64, 128)

    def gradients(packing: ActivationPacking, num_steps: int) -> list[Tensor]:
        return [gradient_of(model, lambda m: m(x).square().mean(), packing) for _ in range(num_steps)]

    model = mlp()
    codec = eager(4, stochastic=True)
    whole = gradients(codec.packing(model), 4)
    first = codec.packing(model)
    gradients(first, 2)
    second = codec.packing(model)
    second.load_state_dict(first.state_dict())
    for found, expected in zip(gradients(second, 2), whole[2:], strict=True):
        assert torch.equal(found, expected)
    others = [eager(4, stochastic=True, seed=1).packing(model), codec.packing(model, rank=1)]
    assert all(not torch.equal(gradients(other, 1)[0], whole[0]) for other in others)
    assert not torch.equal(whole[0], whole[1])


def test_stochastic_gradients_are_right_on_average() -> None:
    model, x = mlp(), torch.randn(64, 128)

    def loss(module: nn.Module) -> Tensor:
        return module(x).square().mean()

    exact = gradient_of(model, loss, None)
    packing = eager(4, stochastic=True).packing(model)
    drawn = [gradient_of(model, loss, packing).clone() for _ in range(16)]
    single = float((drawn[0] - exact).norm() / exact.norm())
    mean = float((sum(drawn) / 16 - exact).norm() / exact.norm())
    assert mean < 0.5 * single


def test_backward_twice_over_a_kept_graph_and_of_a_gradient() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with eager().packing(nn.Module()):
        y = x.exp().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(second.sum(), x)
    torch.testing.assert_close(third, x.exp(), rtol=0.2, atol=0.2)


def test_on_meta_tensors_bytes_are_counted_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
        x = torch.empty(64, 128)
    packing = ActivationCodec().packing(model)
    with packing:
        loss = model(x).sum()
    loss.backward()
    assert packing.last == PackedBytes(2, 2 * 64 * 128 * 4, 2 * (64 * 128 + 32 * 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "`ActivationCodec(bits)` must be 8, 4 or 2, but got bits=3. Use 8"),
        (
            {"group_size": 12},
            "`ActivationCodec(group_size)` must be a multiple of 8 and at least 8, but got group_size=12.",
        ),
        ({"group_size": 0}, "but got group_size=0. Leave it out for 256."),
        ({"group_size": 16.0}, "but got group_size=16.0."),
        (
            {"min_numel": 255},
            "`ActivationCodec(min_numel)` must be at least the size of a group (256), since",
        ),
        ({"min_numel": True, "group_size": 8}, "but got min_numel=True. Leave it out for 4096."),
        ({"seed": -1}, "`ActivationCodec(seed)` must be an integer in [0, 2**32), but got seed=-1. Leave"),
        ({"bits": 8.0}, "must be 8, 4 or 2, but got bits=8.0."),
        ({"stochastic": "no"}, "(stochastic)` must be True or False, but got stochastic='no'. Use one"),
        ({"compiled": 1}, "`ActivationCodec(compiled)` must be True or False or None, but got compiled=1."),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        ActivationCodec(**arguments)
    assert message in str(caught.value)


def test_a_codec_is_a_value() -> None:
    assert ActivationCodec(bits=4) == ActivationCodec(bits=4)
    assert len({ActivationCodec(), ActivationCodec(bits=8)}) == 1
    assert [ActivationCodec(bits=bits).resolved_group_size for bits in (8, 4, 2)] == [256, 64, 64]


class Recurrent(nn.Module):
    """Dynamo cannot trace what is inside, so a compiled block runs it eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.layer = nn.LSTM(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.net(self.layer(x))[0]))


class Block(nn.Module):
    """Dynamo makes one graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).exp()


@pytest.mark.parametrize(("kind", "graphs"), [(Recurrent, 0), (Block, 1)])
def test_blocks_that_are_compiled_in_place_compute_what_they_compute_uncompiled(
    kind: Any, graphs: int
) -> None:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    plain, compiled = nn.Sequential(kind(), nn.Tanh()), nn.Sequential(kind(), nn.Tanh())
    compiled.load_state_dict(plain.state_dict())
    compiled[0].compile(backend="eager")
    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(128, 64)
    found = []
    for model in (plain, compiled):
        packing = eager().packing(model)
        for _ in range(2):
            found.append(gradient_of(model, lambda m: m(x).square().sum(), packing))
        assert packing.last.num_tensors > 2
    assert (counters["frames"]["total"], counters["frames"]["ok"]) == (1, graphs)
    assert counters["graph_break"] == {}  # our hooks are not traced as a part of the block
    for other in found[1:]:
        assert torch.equal(found[0], other)
    torch._dynamo.reset()
