"""Blocks that change arguments, buffers, parameters or attributes train to the bit as without checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanMetric

from lightning_memtrain.checkpointing import Recomputed
from tests.helpers.recomputed import assert_exact, assert_identical, recompute, squares, trained


def _rows() -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(3)]


class _Block(nn.Module):
    """A layer whose forward is a function of it and its input."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.own = forward
        self.register_buffer("ema", torch.zeros(6))
        self.register_buffer("codes", torch.randn(4, 6))
        self.register_buffer("is_ready", torch.tensor(False))
        self.metric = MeanMetric()
        self.num_calls = 0
        self.hidden: Any = None
        self.seen: list[Any] = []
        self.counts: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


def _relu_first(block: _Block, x: Tensor) -> Tensor:
    return block.layer(F.relu_(x))


def _change_a_view(block: _Block, x: Tensor) -> Tensor:
    x[:, 2:].mul_(0.5)
    return block.layer(x).tanh() + 1


def _running_mean(block: _Block, x: Tensor) -> Tensor:
    x = x - block.ema
    with torch.no_grad():
        block.ema.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return block.layer(x) * block.ema.exp()


def _another_buffer(block: _Block, x: Tensor) -> Tensor:
    block.ema = block.ema * 0.9 + x.detach().mean(0) * 0.1
    return block.layer(x) * block.ema.exp()


def _codebook(block: _Block, x: Tensor) -> Tensor:
    x = block.layer(x)
    with torch.no_grad():
        if not block.is_ready:
            block.codes.copy_(x[:4])
            block.is_ready.fill_(True)
        nearest = torch.cdist(x, block.codes).argmin(1)
        block.codes.index_add_(0, nearest, 0.1 * (x - block.codes[nearest]))
    return x + (block.codes[nearest] - x).detach() * block.layer(x).tanh()


def _own_batch_norm(block: _Block, x: Tensor) -> Tensor:
    # The operator does not say that it writes to its statistics.
    var = block.codes[0]
    return block.layer(F.batch_norm(x, block.ema, var, training=True)) * block.ema.exp() + var.sigmoid()


def _initialise_once(block: _Block, x: Tensor) -> Tensor:
    if not block.is_ready:
        block.layer.bias.data.copy_(-block.layer(x).mean(0))
        block.is_ready.fill_(True)
    return block.layer(x).tanh()


def _shrink(block: _Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        block.layer.bias.mul_(0.95)
    block.other.weight.data.mul_(0.9)
    return block.layer(x).tanh() + block.other.weight[0]


def _count(block: _Block, x: Tensor) -> Tensor:
    block.num_calls += 1
    return block.layer(x).tanh() / block.num_calls


def _spike(block: _Block, x: Tensor) -> Tensor:
    hidden = torch.zeros_like(x) if block.hidden is None else block.hidden
    block.hidden = 0.8 * hidden + block.layer(x)
    return block.hidden.sigmoid() * block.other(x)


def _spike_with_pair(block: _Block, x: Tensor) -> Tensor:
    hidden, num = block.hidden or (torch.zeros_like(x), 1)
    block.hidden = (0.8 * hidden + block.layer(x), num + 1)
    return block.hidden[0].sigmoid() * block.other(x) / num


def _collect(block: _Block, x: Tensor) -> Tensor:
    block.seen.append(x.detach().mean())
    block.counts["calls"] = block.counts.get("calls", 0) + 1
    return block.layer(x).tanh() * len(block.seen) / block.counts["calls"] ** 2


def _cache(block: _Block, x: Tensor) -> Tensor:
    if not hasattr(block, "scale"):
        block.scale = torch.rand(6)
    return block.layer(x).tanh() * block.scale


def _measure(block: _Block, x: Tensor) -> Tensor:
    x = block.layer(x)
    block.metric(x.detach().abs())
    return x * block.metric.compute().detach()


def _update(block: _Block, x: Tensor) -> Tensor:
    x = block.layer(x).tanh()
    block.metric.update(x.detach().abs())  # adds to its state in place
    return x + 1


FORWARDS = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if getattr(function, "__annotations__", {}).get("block") == "_Block"
}


class _Model(nn.Module):
    def __init__(self, forward: Callable[..., Any], num_calls: int = 1) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 6), _Block(forward), _Block(forward)
        self.num_calls = num_calls

    def forward(self, x: Tensor) -> Tensor:
        self.block.hidden = self.last.hidden = None
        x = self.first(x)
        for _ in range(self.num_calls):
            x = self.last(self.block(x))
        return x


def _everything(model: nn.Module) -> list[Any]:
    return [
        [
            block.num_calls,
            block.hidden,
            block.seen,
            block.counts,
            # Their names differ between versions of torchmetrics.
            *(getattr(block.metric, name) for name in sorted(block.metric._defaults)),
        ]
        for block in (model.block, model.last)
    ]


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("num_calls", [1, 3])
@pytest.mark.parametrize("together", [False, True])
def test_forwards_with_a_state_train_as_without_checkpoints(
    name: str, num_calls: int, together: bool
) -> None:
    models = []

    def make() -> nn.Module:
        models.append(_Model(FORWARDS[name], num_calls))
        return models[-1]

    groups = [[Recomputed("block"), Recomputed("last")]] if together else None
    assert_exact(make, ["block", "last"], _rows, groups=groups, num_recomputed=6 * num_calls)
    assert_identical(*map(_everything, models))


def test_a_state_that_is_written_to_from_a_later_call_on_is_right() -> None:
    # The call that writes for the first time keeps what it saves; those after it are recomputed.
    def forward(block: _Block, x: Tensor) -> Tensor:
        block.num_calls += 1
        if block.num_calls > 2:
            block.ema.add_(1)
        return block.layer(x).tanh() * block.ema.exp()

    def batches() -> list[Tensor]:
        return [torch.randn(5, 6) for _ in range(5)]

    assert_exact(lambda: _Model(forward), ["block"], batches, num_recomputed=4)


def test_each_mode_has_its_own_habits() -> None:
    def forward(block: _Block, x: Tensor) -> Tensor:
        if block.training:
            block.ema.add_(1)
        return block.layer(x).tanh() * block.ema.exp()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        model.train(not model.training)
        return squares(model, x) + squares(model, x + 1)

    assert_exact(lambda: _Model(forward), ["block"], _rows, loss, num_recomputed=6)


def test_parameters_that_are_swapped_in_for_a_call_are_those_of_the_recomputation() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6))
        if checkpointed:
            recompute(model, "1")
        x = torch.randn(5, 6)
        inner = torch.autograd.grad(squares(model, x), [*model.parameters()], create_graph=True)
        fast = {
            name: parameter - 0.5 * gradient
            for (name, parameter), gradient in zip(model.named_parameters(), inner, strict=True)
        }
        torch.func.functional_call(model, fast, (x,)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_identical(*gradients)


def test_what_shares_memory_with_what_is_written_to_is_refused() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x.add_(1)
            return x * y.exp()

    model = nn.ModuleList([nn.Linear(6, 6), Adds()])
    recompute(model, "1")
    x = model[0](torch.randn(5, 6))
    with pytest.raises(
        RuntimeError,
        match=r"cannot recompute '1': what it writes to in place must not share memory with anything else "
        r"that it is given, but argument 1 and argument 2 do. Pass a copy \(`.clone\(\)`\)",
    ):
        model[1](x, x.view_as(x))
    model[1](x, x.clone()).sum().backward()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda block: block.layer.bias.add_(1), "parameter 'layer.bias'"),
        (lambda block: block.ema.add_(1), "buffer 'ema'"),
        (lambda block: block.hidden.add_(1), "attribute 'hidden'"),
    ],
)
def test_a_change_between_forward_and_backward_is_refused(change: Callable[[_Block], Any], text: str) -> None:
    def forward(block: _Block, x: Tensor) -> Tensor:
        hidden = block.hidden if block.hidden is not None else block.ema.clone()
        block.hidden = hidden * 0.5
        return block.layer(x).tanh() + block.ema + hidden

    block = _Block(forward)
    recompute(block, "")
    x = torch.randn(5, 6)
    block(x).sum().backward()
    hidden = block.hidden
    loss = block(x).sum()
    block.hidden = hidden
    with torch.no_grad():
        change(block)
    with pytest.raises(
        RuntimeError, match=rf"cannot recompute '': its {text} was changed in place after its"
    ):
        loss.backward()


def test_an_argument_that_is_changed_after_the_call_is_refused_by_autograd() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    recompute(model, "1")
    hidden = model[0](torch.randn(5, 6))
    loss = model[1](hidden).sum()
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


def test_a_tensor_that_forward_saves_and_then_changes_is_refused_as_without_checkpoints() -> None:
    def forward(block: _Block, x: Tensor) -> Tensor:
        y = block.layer(x).exp()
        z = y.mul_(2)
        return block.other(z)

    for checkpointed in (False, True):
        block = _Block(forward)
        if checkpointed:
            recompute(block, "")
        with pytest.raises(RuntimeError, match="inplace operation"):
            block(torch.randn(5, 6)).sum().backward()


def test_a_forward_that_is_another_one_the_second_time_is_refused() -> None:
    block = _Block(lambda block, x: block.layer(x).tanh())
    recompute(block, "")
    loss = block(torch.randn(5, 6)).sum()
    block.own = lambda block, x: block.layer(x)
    with pytest.raises(
        RuntimeError,
        match=r"recomputed '' and got something else than in forward: of the tensors that are saved for "
        r"backward, number 2 must be \[5, 6\] of torch.float32 on cpu, but got none. Its forward depends on",
    ):
        loss.backward()
    loss = block(torch.randn(5, 6)).sum()
    block.own = lambda block, x: block.layer(x.repeat(2, 1)).tanh()
    with pytest.raises(
        RuntimeError, match=r"number 1 must be \[5, 6\] .* but got \[10, 6\] of torch.float32"
    ):
        loss.backward()


def test_random_numbers_that_an_operator_adds_to_what_is_saved_are_there() -> None:
    # Autograd saves the noise of `rrelu` before it is drawn, so the recomputation must not end there.
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.RReLU(), nn.Linear(6, 6)))
    recompute(model, "1")
    with FlopCounterMode(display=False) as counter:
        trained(model, [torch.randn(5, 6)])
    linear = 2 * 5 * 6 * 6
    assert counter.get_total_flops() == linear * (3 + 5 + 2)
