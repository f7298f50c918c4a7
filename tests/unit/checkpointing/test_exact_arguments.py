"""Whatever a block is given and returns, it trains to the bit as without checkpoints."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lightning_memtrain.checkpointing import Recomputed, insert_checkpoints
from tests.helpers.recomputed import assert_exact, assert_identical, recompute

Pair = namedtuple("Pair", ["left", "right"])


def _rows() -> list[Tensor]:
    return [torch.randn(4, 6) for _ in range(2)]


class _Block(nn.Module):
    """A layer whose forward is a function of it and of what comes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class _Model(nn.Module):
    """Calls its block by a function of the block and the first layer's output."""

    def __init__(self, forward: Callable[..., Any], call: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), _Block(forward)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.block, self.first(x))


@dataclass
class _State:
    hidden: Tensor
    step: int = 0


def _steps(block: _Block, state: _State) -> Tensor:
    state.hidden = block.layer(state.hidden).tanh()
    state.step += 1
    return state.hidden * state.step


def _attend(block: _Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = block.layer(query).sigmoid()
    return hidden if query is key is value else hidden * block.other(key) + value


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "several tensors": (lambda b, x, y: b.layer(x) * b.other(y).tanh(), lambda b, x: b(x, x.exp())),
    "the same tensor": (_attend, lambda b, x: b(x, x, x)),
    "equal tensors": (_attend, lambda b, x: b(x, x.clone(), x.clone())),
    "keywords": (lambda b, x, scale, bias=None: b.layer(x) * scale, lambda b, x: b(x=x, scale=x.abs())),
    "numbers": (lambda b, x, k, name: b.layer(x).pow(k), lambda b, x: b(x, 3, name="cube")),
    "none": (lambda b, x, mask=None: b.layer(x) if mask is None else x, lambda b, x: b(x, mask=None)),
    "mask": (lambda b, x, m: b.layer(x).masked_fill(m, 0.0), lambda b, x: b(x, x.detach() > 0)),
    "nested arguments": (
        lambda b, pair, more: b.layer(pair[0]) * more["y"][0],
        lambda b, x: b((x, [1]), {"y": [x.exp(), None]}),
    ),
    "named tuple": (lambda b, p: b.layer(p.left) * p.right.tanh(), lambda b, x: b(Pair(x, x.exp()))),
    "dataclass": (lambda b, s: b.layer(s.hidden).tanh(), lambda b, x: b(_State(x))),
    "dataclass that the block changes": (
        _steps,
        lambda b, x: [b(state := _State(x)), b(state), state.hidden],
    ),
    "model output": (lambda b, o: b.layer(o.last_hidden_state).relu(), lambda b, x: b(BaseModelOutput(x))),
    "parameter": (lambda b, x, w: F.linear(b.layer(x), w).tanh(), lambda b, x: b(x, b.other.weight)),
    "a function": (lambda b, x, f: f(b.layer(x)), lambda b, x: b(x, torch.tanh)),
    "a module": (lambda b, x, layer: layer(x).tanh(), lambda b, x: b(x, b.layer)),
    "without gradient": (lambda b, x: b.layer(x).tanh() * b.other(x), lambda b, x: b(x.detach())),
    "some without gradient": (lambda b, x, y: b.layer(x) * b.other(y), lambda b, x: b(x, x.detach() * 2)),
    "integers": (lambda b, x, i: b.layer(x)[i].tanh(), lambda b, x: b(x, torch.tensor([2, 0, 0]))),
    "several outputs": (lambda b, x: (b.layer(x).tanh(), b.other(x)), lambda b, x: b(x)),
    "one output unused": (lambda b, x: (b.layer(x).tanh(), b.other(x).exp()), lambda b, x: b(x)[0]),
    "nested outputs": (lambda b, x: {"a": [b.layer(x).tanh()], "b": (None, x, 3)}, lambda b, x: b(x)),
    "ordered outputs": (lambda b, x: OrderedDict(z=b.layer(x).tanh(), a=x), lambda b, x: b(x)),
    "named outputs": (lambda b, x: Pair(b.layer(x).tanh(), x), lambda b, x: b(x)),
    "dataclass output": (lambda b, x: _State(b.layer(x).tanh(), 3), lambda b, x: b(x).hidden),
    "model output returned": (lambda b, x: BaseModelOutput(b.layer(x).tanh()), lambda b, x: b(x)),
    "an output without gradient": (lambda b, x: (b.layer(x).exp(), x.argmax()), lambda b, x: b(x)),
    "the input itself": (lambda b, x: (x, b.layer(x).tanh()), lambda b, x: b(x)),
    "a view of the input": (lambda b, x: (x[1:], b.layer(x).tanh().t()), lambda b, x: b(x)),
    "the same output twice": (lambda b, x: (y := b.layer(x).tanh(), y), lambda b, x: b(x)),
    "no gradient inside": (
        lambda b, x: b.layer(x) * torch.no_grad()(b.other)(x).sigmoid() + b.layer(x).detach().exp(),
        lambda b, x: b(x),
    ),
    "a gradient inside": (
        lambda b, x: torch.autograd.grad(b.layer(x).sin().sum(), x, create_graph=True)[0].tanh() + b.other(x),
        lambda b, x: b(x),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_train_as_without_checkpoints(name: str) -> None:
    forward, call = CALLS[name]
    num_calls = 4 if name == "dataclass that the block changes" else 2
    assert_exact(lambda: _Model(forward, call), ["block"], _rows, num_recomputed=num_calls)


def test_a_list_that_the_block_adds_to_is_the_callers() -> None:
    def forward(block: _Block, x: Tensor, collected: list[Tensor]) -> Tensor:
        collected.append(block.layer(x).tanh())
        return x + len(collected) * collected[-1]

    def call(block: _Block, x: Tensor) -> list[Tensor]:
        collected: list[Tensor] = []
        x = block(block(x, collected), collected)
        assert len(collected) == 2
        return [x, *collected]

    assert_exact(lambda: _Model(forward, call), ["block"], _rows, num_recomputed=4)


def test_leaves_that_need_a_gradient_get_it() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        if checkpointed:
            recompute(block, "")
        x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
        (block(x) * block(x * weight)).sum().backward()
        gradients.append([x.grad, weight.grad, block[0].weight.grad])
    assert_identical(*gradients)


def test_tensors_of_inference_mode_may_be_passed() -> None:
    # E.g. a mask that the model made in validation and holds on to.
    with torch.inference_mode():
        offset = torch.linspace(0, 1, 6)
    assert_exact(
        lambda: _Model(lambda b, x, o: b.layer(x).tanh() + o, lambda b, x: b(x, offset)), ["block"], _rows
    )


def test_buffers_of_inference_mode_may_be_used() -> None:
    def make() -> nn.Module:
        model = _Model(lambda b, x: b.layer(x).tanh() + b.offset, lambda b, x: b(x))
        with torch.inference_mode():
            model.block.register_buffer("offset", torch.linspace(0, 1, 6))
        return model

    assert_exact(make, ["block"], _rows)


@pytest.mark.parametrize("shared", ["module", "parameter"])
def test_weights_may_be_shared(shared: str) -> None:
    def make() -> nn.Module:
        one, two = (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))
        two[0].weight = one[0].weight
        return nn.Sequential(one, nn.Linear(6, 6), one if shared == "module" else two)

    names = ["0"] if shared == "module" else ["0", "2"]
    assert_exact(make, names, _rows, num_recomputed=4)


def test_frozen_modules_stay_frozen() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
        model[0].requires_grad_(False)
        model[2].requires_grad_(False)
        return model

    # Of the first block, nothing is saved.
    assert_exact(make, ["0", "1", "2"], _rows, num_recomputed=4)


def test_a_segment_hands_over_whatever_its_modules_return() -> None:
    def one(block: _Block, x: Tensor, scale: int) -> dict[str, Any]:
        return {"y": block.layer(x).tanh(), "z": [x * scale, block.other(x).detach()], "n": scale + 1}

    def two(block: _Block, z: list[Tensor], y: Tensor, n: int, shift: Tensor) -> tuple[Tensor, Tensor]:
        return block.layer(z[0]) * y + shift, z[1].exp() * n

    def three(block: _Block, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.dropout(block.layer(pair[0]), 0.4) * block.other(pair[1])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(_Block(function) for function in (one, two, three))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](self.blocks[1](**self.blocks[0](x, 3), shift=x.sin()))

    names = [f"blocks.{index}" for index in range(3)]
    for paths in ([()] * 3, [(0,), (0,), (1,)], [(0, 0), (0, 1), (1,)]):
        groups = [[Recomputed(name, path) for name, path in zip(names, paths, strict=True)]]
        num = {(): 6, (0,): 10, (0, 0): 12}[paths[0]]
        assert_exact(Model, names, _rows, groups=groups, num_recomputed=num)


def test_a_segment_keeps_what_was_changed_in_between() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ELU()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            x = self.blocks[1](x + 1)  # another tensor
            return self.blocks[2](x.mul_(2) if not x.requires_grad else x.clone().mul_(2)) + x

    groups = [[Recomputed(f"blocks.{index}") for index in range(3)]]
    assert_exact(Model, [], _rows, groups=groups, num_recomputed=6)


def test_modules_that_catch_exceptions_are_recomputed() -> None:
    # The recomputation ends with an exception, where all is made that backward needs.
    def forward(block: _Block, x: Tensor) -> Tensor:
        try:
            x = block.layer(x).tanh()
        except Exception:
            x = x.exp()
        return x + 1

    assert_exact(lambda: _Model(forward, lambda b, x: b(x)), ["block"], _rows)


def test_a_module_may_call_itself() -> None:
    def forward(block: _Block, x: Tensor, depth: int) -> Tensor:
        x = block.layer(x).tanh()
        return block(x, depth - 1) + x if depth else x

    model = _Model(forward, lambda b, x: b(x, 2))
    remove = insert_checkpoints(model, [[Recomputed("block")]])
    x = torch.randn(4, 6)
    with_checkpoints = torch.autograd.grad(model(x).sum(), [*model.first.parameters()])
    remove()
    assert_identical(with_checkpoints, torch.autograd.grad(model(x).sum(), [*model.first.parameters()]))
