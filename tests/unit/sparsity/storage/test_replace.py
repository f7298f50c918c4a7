"""Entries move: values, gradients and optimizer state go with them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain import sparsify_
from lightning_memtrain.precision import SGD8bit
from lightning_memtrain.precision.optimizers import blockwise_quantization as blockwise
from lightning_memtrain.sparsity import SparseWeight

MEAN, ZERO = "mean", "zero"

OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], dict[str, str]]] = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1), {}),
    "SGD momentum": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"momentum_buffer": ZERO}),
    "Adam": (torch.optim.Adam, {"exp_avg": ZERO, "exp_avg_sq": MEAN}),
    "AdamW amsgrad": (
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        {"exp_avg": ZERO, "exp_avg_sq": MEAN, "max_exp_avg_sq": MEAN},
    ),
    "Adamax": (torch.optim.Adamax, {"exp_avg": ZERO, "exp_inf": MEAN}),
    "NAdam": (torch.optim.NAdam, {"exp_avg": ZERO, "exp_avg_sq": MEAN}),
    "RAdam": (torch.optim.RAdam, {"exp_avg": ZERO, "exp_avg_sq": MEAN}),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        {"square_avg": MEAN, "momentum_buffer": ZERO, "grad_avg": ZERO},
    ),
    "Adagrad": (torch.optim.Adagrad, {"sum": MEAN}),
    "Adadelta": (torch.optim.Adadelta, {"square_avg": MEAN, "acc_delta": MEAN}),
    "Rprop": (torch.optim.Rprop, {"prev": ZERO, "step_size": MEAN}),
    "Adafactor": (torch.optim.Adafactor, {"variance": MEAN}),
    "ASGD": (torch.optim.ASGD, {"ax": ZERO}),
}


def stepped(
    make: Callable[[Any], Optimizer], num_steps: int = 3
) -> tuple[nn.Linear, SparseWeight, Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(10, 10)
    weight = sparsify_(layer, {"weight": torch.arange(0, 100, 5)})["weight"]
    optimizer = make(layer.parameters())
    for _ in range(num_steps):
        optimizer.zero_grad()
        layer(torch.randn(4, 10)).pow(2).sum().backward()
        optimizer.step()
    return layer, weight, optimizer


KEPT = torch.tensor([i % 3 != 0 for i in range(20)])


def moved_by_hand(entries: Tensor, positions: Tensor, grown: Tensor, fill: float | Tensor) -> Tensor:
    pairs = dict(zip(positions[KEPT].tolist(), entries[KEPT].tolist(), strict=True))
    pairs |= dict.fromkeys(grown.tolist(), float(fill))
    return torch.tensor([pairs[position] for position in sorted(pairs)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_with_the_entries(name: str) -> None:
    make, fills = OPTIMIZERS[name]
    layer, weight, optimizer = stepped(make)
    grown = torch.tensor([1, 2, 51, 99])
    before = dict(optimizer.state[weight.values])
    positions, values, gradient = weight.positions(), weight.values.clone(), weight.values.grad.clone()
    parameter = weight.values
    weight.replace(KEPT, grown, [optimizer])
    assert weight.values is parameter
    assert weight.positions().tolist() == sorted([*positions[KEPT].tolist(), *grown.tolist()])
    assert torch.equal(weight.values.detach(), moved_by_hand(values.detach(), positions, grown, 0))
    assert torch.equal(weight.values.grad, moved_by_hand(gradient, positions, grown, 0))
    after = optimizer.state[weight.values]
    assert after.keys() == before.keys()
    elementwise = {
        key for key, value in before.items() if isinstance(value, Tensor) and value.shape == KEPT.shape
    }
    assert elementwise == fills.keys()
    for key, value in after.items():
        if key in fills:
            fill = before[key][KEPT].mean() if fills[key] == MEAN else 0
            assert torch.equal(value, moved_by_hand(before[key], positions, grown, fill)), key
        else:
            assert value is before[key], key
    layer(torch.randn(4, 10)).pow(2).sum().backward()
    optimizer.step()


def test_state_by_another_name_is_a_scale_where_it_is_nowhere_negative() -> None:
    _, weight, optimizer = stepped(lambda p: torch.optim.SGD(p, 0.1))
    scale, direction = torch.rand(20), torch.randn(20)
    optimizer.state[weight.values] = {"their_scale": scale, "their_direction": direction, "count": 3}
    positions, grown = weight.positions(), torch.tensor([1])
    weight.replace(KEPT, grown, [optimizer])
    state = optimizer.state[weight.values]
    assert torch.equal(state["their_scale"], moved_by_hand(scale, positions, grown, scale[KEPT].mean()))
    assert torch.equal(state["their_direction"], moved_by_hand(direction, positions, grown, 0))
    assert state["count"] == 3


def test_where_nothing_stays_the_mean_is_that_of_all() -> None:
    _, weight, optimizer = stepped(torch.optim.Adam)
    mean = optimizer.state[weight.values]["exp_avg_sq"].mean()
    weight.replace(torch.zeros(20, dtype=torch.bool), torch.tensor([3, 4]), [optimizer])
    assert optimizer.state[weight.values]["exp_avg_sq"].tolist() == [mean.item()] * 2
    weight.replace(torch.zeros(2, dtype=torch.bool), torch.tensor([], dtype=torch.int64), [optimizer])
    assert weight.nnz == 0
    weight.replace(torch.zeros(0, dtype=torch.bool), torch.tensor([7]), [optimizer])
    assert weight.positions().tolist() == [7]
    assert optimizer.state[weight.values]["exp_avg_sq"].tolist() == [0.0]


def test_a_grown_weight_steps_as_far_as_its_neighbours_under_adam() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 1, bias=False)
    weight = sparsify_(layer, {"weight": torch.arange(50)})["weight"]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(300):
        layer.zero_grad()
        weight.values.grad = torch.randn(50)
        optimizer.step()
    weight.replace(torch.ones(50, dtype=torch.bool), torch.arange(50, 60), [optimizer])
    before = weight.values.detach().clone()
    weight.values.grad = torch.ones(60)
    optimizer.step()
    steps = (weight.values.detach() - before).abs()
    assert steps[50:].max() < 1.1 * 0.01 * 0.1 * (1 / (1 - 0.9**301))  # lr * (1 - beta1), v being about 1


def test_momentum_in_8_bits_goes_with_its_entries() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 100)
    weight = sparsify_(layer, {"weight": torch.arange(0, 10_000, 10)})["weight"]
    optimizer = SGD8bit(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(4, 100)).pow(2).sum().backward()
    optimizer.step()
    state = optimizer.state[weight.values]
    before = blockwise.dequantize_blockwise(state["momentum_codes"], state["momentum_scales"])
    kept = torch.rand(1000) > 0.3
    grown = torch.tensor([3, 7777, 9999])
    survivors = weight.positions()[kept]
    weight.replace(kept, grown, [optimizer])
    codes, scales = state["momentum_codes"], state["momentum_scales"]
    assert (codes.shape, codes.dtype) == (weight.values.shape, torch.int8)
    assert scales.shape == (blockwise.num_blocks(weight.nnz),)
    after = blockwise.dequantize_blockwise(codes, scales)
    places = torch.searchsorted(weight.positions(), survivors)
    step = before.abs().max() / 127
    assert (after[places] - before[kept]).abs().max() <= step / 2 * 1.001
    assert (after[torch.searchsorted(weight.positions(), grown)] == 0).all()
    layer(torch.randn(4, 100)).pow(2).sum().backward()
    optimizer.step()


def table(signed: bool) -> Tensor:
    """256 levels, denser near 0, like the tables of bitsandbytes."""
    if signed:
        half = torch.logspace(-7, 0, 127)
        return torch.cat([-half.flip(0), torch.zeros(2), half])
    return torch.cat([torch.zeros(1), torch.logspace(-7, 0, 255)])


@pytest.mark.parametrize("nnz", [5000, 256])
def test_state_in_the_form_of_bitsandbytes_goes_with_its_entries(nnz: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 100)
    weight = sparsify_(layer, {"weight": torch.randperm(10_000)[:nnz]})["weight"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scales = torch.rand(2, -(-nnz // 256)) + 0.1
    codes = torch.randint(256, (2, nnz), dtype=torch.uint8)
    optimizer.state[weight.values] = {
        "step": 3,
        **{f"state{i + 1}": codes[i] for i in range(2)},
        **{f"qmap{i + 1}": table(signed=i == 0) for i in range(2)},
        **{f"absmax{i + 1}": scales[i] for i in range(2)},
        "unorm_vec": torch.zeros(1),
    }

    def decoded(number: int) -> Tensor:
        state = optimizer.state[weight.values]
        numbers = state[f"qmap{number}"][state[f"state{number}"].int()]
        return numbers * state[f"absmax{number}"].repeat_interleave(256)[: len(numbers)]

    before = decoded(1), decoded(2)
    kept = torch.rand(nnz) > 0.3
    survivors = weight.positions()[kept]
    free = torch.ones(10_000, dtype=torch.bool).index_fill_(0, weight.positions(), False)
    grown = free.nonzero().view(-1)[:10]
    weight.replace(kept, grown, [optimizer])
    state = optimizer.state[weight.values]
    assert state["state1"].shape == state["state2"].shape == weight.values.shape
    assert state["absmax1"].shape == (-(-weight.nnz // 256),)
    assert (state["step"], state["unorm_vec"].shape) == (3, (1,))
    at_survivors, at_grown = (torch.searchsorted(weight.positions(), where) for where in (survivors, grown))
    for number in (1, 2):
        after, expected = decoded(number), before[number - 1][kept]
        # The levels lie 14 (signed) and 7 percent apart; small numbers go to the smallest level.
        assert ((after[at_survivors] - expected).abs() <= 0.07 * expected.abs() + 2e-7).all()
        fill = expected.mean() if number == 2 else torch.tensor(0.0)
        assert ((after[at_grown] - fill).abs() <= 0.07 * fill).all()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "SGD8bit", "RMSprop8bit"])
def test_bitsandbytes_steps_on_after_entries_moved(name: str) -> None:
    optim = import_module("bitsandbytes.optim")
    options = {"momentum": 0.9} if name == "SGD8bit" else {}
    layer = nn.Linear(300, 300)
    weight = sparsify_(layer, {"weight": torch.randperm(90_000)[:9000]})["weight"]
    optimizer = getattr(optim, name)(layer.parameters(), lr=1e-3, **options)
    for step in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 300)).pow(2).sum().backward()
        optimizer.step()
        free = torch.ones(90_000, dtype=torch.bool).index_fill_(0, weight.positions(), False)
        kept = torch.rand(weight.nnz) > 0.2
        weight.replace(kept, free.nonzero().view(-1)[: 500 + step], [optimizer])
        assert optimizer.state[weight.values]["state1"].dtype == torch.uint8
    assert weight.values.isfinite().all()


def test_before_its_first_step_an_optimizer_has_nothing_to_move() -> None:
    for make in (torch.optim.Adam, lambda p: SGD8bit(p, lr=0.1), torch.optim.LBFGS):
        _, weight, optimizer = stepped(make, num_steps=0)
        weight.replace(KEPT, torch.tensor([1]), [optimizer])
        assert weight.nnz == KEPT.sum() + 1


class Shampoo(Optimizer):
    """Keeps a square matrix per parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["preconditioner"] = torch.eye(p.numel())


def test_state_that_cannot_follow_is_refused_before_anything_changed() -> None:
    _, weight, adam = stepped(torch.optim.Adam)
    values, state = weight.values.clone(), dict(adam.state[weight.values])
    shampoo = Shampoo([weight.values])
    shampoo.step()
    with pytest.raises(
        TypeError,
        match=r"The state 'preconditioner' of Shampoo \(Tensor of shape \(20, 20\).*cannot.*reindex_state",
    ):
        weight.replace(KEPT, torch.tensor([1]), [adam, shampoo])
    assert torch.equal(weight.values, values)
    assert all(adam.state[weight.values][key] is value for key, value in state.items())
    history = torch.optim.LBFGS([weight.values])
    history.step(lambda: weight.values.pow(2).sum().backward() or weight.values.pow(2).sum())
    with pytest.raises(TypeError, match=r"of LBFGS \(list\)"):
        weight.replace(KEPT, torch.tensor([1]), [history])


def test_an_optimizer_that_knows_how_moves_its_own_state() -> None:
    calls = []

    class Knows(Shampoo):
        def reindex_state(self, parameter: Tensor, source: Tensor) -> None:
            calls.append((parameter.numel(), source.tolist()))

    _, weight, _ = stepped(torch.optim.Adam, num_steps=0)
    kept = torch.zeros(20, dtype=torch.bool)
    kept[[3, 4]] = True
    weight.replace(kept, torch.tensor([16]), [Knows([weight.values])])
    assert calls == [(20, [3, -1, 4])]


@pytest.mark.parametrize(
    ("kept", "grown", "message"),
    [
        (KEPT[:-1], torch.tensor([1]), r"replace.kept.` must be bool of shape \(20,\).*shape \(19,\)"),
        (KEPT.long(), torch.tensor([1]), "must be bool .* but got torch.int64"),
        (KEPT, torch.tensor([100]), "replace.grown.` of 'weight' must be from 0 to 99, but got 100 to 100"),
        (KEPT, torch.tensor([2, 1]), "ascending, each position once"),
        (KEPT, torch.tensor([5]), "none of them kept, but some come twice"),
        (KEPT, torch.tensor([1.0]), "integers of one axis"),
    ],
)
def test_a_wrong_choice_is_refused(kept: Tensor, grown: Tensor, message: str) -> None:
    _, weight, optimizer = stepped(torch.optim.Adam)
    positions = weight.positions()
    with pytest.raises(ValueError, match=message):
        weight.replace(kept, grown, [optimizer])
    assert torch.equal(weight.positions(), positions)


def test_auto_storage_is_chosen_anew() -> None:
    layer = nn.Linear(100, 100)
    weight = sparsify_(layer, {"weight": torch.arange(10)})["weight"]
    assert layer.sparsity_pattern.dtype == torch.int16
    weight.replace(torch.ones(10, dtype=torch.bool), torch.arange(10, 5000), [])
    assert layer.sparsity_pattern.dtype == torch.uint8


def test_chunks_follow() -> None:
    layer = nn.Linear(8, 16).double()
    weight = sparsify_(layer, {"weight": torch.arange(20)}, chunk_bytes=1)["weight"]
    assert [span.value_stop - span.value_start for span in layer.spans] == [20, 0]
    weight.replace(torch.arange(20) < 5, torch.arange(100, 107), [])
    assert [span.value_stop - span.value_start for span in layer.spans] == [5, 7]
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moves_while_the_graph_of_the_last_step_is_alive(grow: bool, dtype: torch.dtype) -> None:
    # A loss that is still held, or DDP, keeps the node that accumulates the gradient, which knows the old
    # shape and would be used again.
    layer = nn.Linear(10, 10).to(dtype)
    weight = sparsify_(layer, {"weight": torch.arange(0, 100, 5)})["weight"]
    hooked = []
    weight.values.register_hook(lambda gradient: hooked.append(gradient.shape))
    weight.values.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad.shape))
    held = layer(torch.ones(2, 10, dtype=dtype)).sum()
    held.backward(retain_graph=True)
    weight.replace(KEPT, torch.arange(1, 5) if grow else torch.tensor([1]), [])
    weight.values.grad = None
    hooked.clear()
    layer(torch.ones(2, 10, dtype=dtype)).sum().backward()
    assert weight.values.grad.shape == weight.values.shape
    assert hooked == [weight.values.shape] * 2


def test_between_accumulated_batches_the_gradient_goes_on() -> None:
    layer = nn.Linear(10, 10).double()
    weight = sparsify_(layer, {"weight": torch.arange(0, 100, 5)})["weight"]
    x = torch.randn(2, 10, dtype=torch.float64)
    layer(x).sum().backward()
    weight.replace(KEPT, torch.tensor([1]), [])
    layer(x).sum().backward()
    dense = x.sum(0).expand(10, 10).reshape(-1)[weight.positions()]
    times = torch.where(weight.positions() == 1, 1.0, 2.0)
    torch.testing.assert_close(weight.values.grad, dense * times)
