"""However backward is run, gradients are to the bit those without checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_memtrain.checkpointing import Recomputed, insert_checkpoints
from tests.helpers.recomputed import assert_identical, recomputations

NAMES = [f"blocks.{index}" for index in range(4)]
GROUPS: dict[str, list[list[Recomputed]]] = {
    "each": [[Recomputed(name)] for name in NAMES],
    "pairs": [[Recomputed(name) for name in pair] for pair in (NAMES[:2], NAMES[2:])],
    "all": [[Recomputed(name) for name in NAMES]],
    "nested": [[Recomputed(name, (i // 2, i % 2)) for i, name in enumerate(NAMES)]],
    "uneven": [
        [Recomputed(name, path) for name, path in zip(NAMES, [(0,), (1, 0), (1, 1), (1, 1)], strict=True)]
    ],
}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.layer(x).sin()).sigmoid())


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(_Block() for _ in NAMES), nn.Linear(6, 3)

    def hidden(self, x: Tensor) -> list[Tensor]:
        hidden = [x]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)[-1])


def _x() -> Tensor:
    return torch.randn(5, 6)


def _plain(net: _Net) -> None:
    net(_x()).square().sum().backward()


def _twice(net: _Net) -> None:
    loss = net(_x()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()


def _partly(net: _Net) -> list[Any]:
    x = _x().requires_grad_()
    hidden = net.hidden(x)
    out = net.head(hidden[-1])
    first = torch.autograd.grad(hidden[2].sum(), [*net.blocks[1].parameters(), x], retain_graph=True)
    second = torch.autograd.grad(out[0, 0], [hidden[3], net.head.weight], retain_graph=True)
    out.square().sum().backward(inputs=[*net.blocks[0].parameters(), *net.blocks[3].layer.parameters()])
    return [first, second]


def _penalised(net: _Net) -> list[Any]:
    x = _x().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    (gradient.norm(2, dim=1) - 1).square().mean().backward()
    return [x.grad]


def _curvature(net: _Net) -> list[Any]:
    x = _x().requires_grad_()
    parameters = [*net.parameters()]
    gradients = torch.autograd.grad(net(x).square().sum(), parameters, create_graph=True)
    along = torch.autograd.grad(
        sum((g * p).sum() for g, p in zip(gradients, parameters, strict=True)), x, create_graph=True
    )
    return list(torch.autograd.grad(along[0].square().sum(), parameters))


def _several_forwards(net: _Net) -> None:
    losses = [net(_x()).square().sum() for _ in range(3)]
    for loss in (losses[1], losses[2], losses[0]):
        loss.backward()


def _forwards_and_backwards_in_turn(net: _Net) -> None:
    previous = net(_x()).square().sum()
    for _ in range(3):
        loss = net(_x()).square().sum()
        previous.backward()
        previous = loss
    previous.backward()


def _adversarial(net: _Net) -> None:
    fake = net.blocks[1](net.blocks[0](_x()))
    judge = nn.Sequential(net.blocks[2], net.blocks[3], net.head)
    (judge(_x()).sigmoid().log().sum() + (1 - judge(fake.detach()).sigmoid()).log().sum()).backward()
    net.blocks[:2].zero_grad()
    judge(fake).sigmoid().log().sum().backward()


def _in_reverse(net: _Net) -> None:
    x = _x()
    for block in reversed(net.blocks):
        x = block(x)
    x.square().sum().backward()


def _in_a_loop(net: _Net) -> None:
    x = _x()
    for _ in range(3):
        for block in net.blocks:
            x = block(x)
    x.square().sum().backward()


def _goes_on_after_backward(net: _Net) -> None:
    hidden = net.blocks[1](net.blocks[0](_x()))
    hidden.sum().backward(retain_graph=True)
    net.blocks[3](net.blocks[2](hidden)).square().sum().backward()


def _validated_in_between(net: _Net) -> list[Any]:
    loss = net(_x()).square().sum()
    net.eval()
    with torch.no_grad():
        seen = [net(_x())]
    with torch.inference_mode():
        seen.append(net(_x()).clone())
    net.train()
    loss.backward()
    return [tensor.tolist() for tensor in seen]


def _fails_in_between(net: _Net) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    for module in (net.blocks[2], net.blocks[1].norm):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyError, match="in the middle"):
            net(_x())
        handle.remove()
    net(_x()).square().sum().backward()


def _goes_on_after_a_failure(net: _Net) -> None:
    def fail(*_: Any) -> None:
        raise KeyError

    hidden = net.blocks[1](net.blocks[0](_x()))
    handle = net.blocks[2].drop.register_forward_hook(fail)
    try:
        hidden = net.blocks[2](hidden)
    except KeyError:
        hidden = hidden * 2
    handle.remove()
    net.blocks[3](hidden).square().sum().backward()


def _fails_in_backward(net: _Net) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    hidden = net.hidden(_x())
    loss = net.head(hidden[-1]).square().sum()
    handle = hidden[2].register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()
    net.zero_grad()
    net(_x()).square().sum().backward()


def _skips(net: _Net) -> None:
    one = net.blocks[0](_x())
    two = net.blocks[1](one)
    three = net.blocks[2](two + one)
    (net.blocks[3](three) * one + two).square().sum().backward()


def _in_bfloat16(net: _Net) -> None:
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(_x()).float().square().sum() + net(_x()).float().sum()
        loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(_x()).float().sum().backward()  # inside
        with torch.autocast("cpu", enabled=False):
            net(_x()).sum().backward()


def _with_anomalies_detected(net: _Net) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        net(_x()).square().sum().backward()


def _offloaded(net: _Net) -> None:
    with save_on_cpu():
        loss = net(_x()).square().sum()
    loss.backward()


def _saved_by_a_method(net: _Net) -> None:
    with saved_tensors_hooks(Tensor.clone, Tensor.detach):
        loss = net(_x()).square().sum()
    loss.backward()


def _all_checkpointed_by_torch(net: _Net) -> None:
    checkpoint(net, _x(), use_reentrant=False).square().sum().backward()


def _some_checkpointed_by_torch(net: _Net) -> None:
    x = _x()
    for block in net.blocks:
        x = checkpoint(lambda x, block=block: block(x).tanh() + x, x, use_reentrant=False)
    x.square().sum().backward()


def _checkpointed_reentrantly(net: _Net) -> None:
    checkpoint(net, _x().requires_grad_(), use_reentrant=True).square().sum().backward()


def _under_a_smaller_graph(net: _Net) -> None:
    hidden = net.blocks[0](_x())
    with torch.no_grad():
        net.blocks[1](hidden)
    net.blocks[2](net.blocks[3](hidden.detach())).sum().backward()
    net.blocks[1](hidden).sum().backward()


def _with_hooks(net: _Net) -> list[Any]:
    seen: list[Any] = []
    net.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.blocks[1].register_forward_hook(lambda module, args, output: output + 1)
    net.blocks[2].register_full_backward_hook(lambda module, grads, _: seen.append(grads[0].clone()))
    net.blocks[2].layer.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))
    net.blocks[3].layer.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,))
    net.blocks[3].layer.weight.register_hook(lambda gradient: gradient * 5)
    net.head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    hidden = net.hidden(_x())
    hidden[1].register_hook(lambda gradient: gradient + 1)
    hidden[2].retain_grad()
    net.head(hidden[-1]).square().sum().backward()
    return [*seen, hidden[2].grad]


USES: dict[str, Callable[[_Net], Any]] = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if getattr(function, "__annotations__", {}).get("net") == "_Net"
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", USES)
def test_backward_gives_the_gradients_without_checkpoints(name: str, groups: str) -> None:
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = _Net()
        if checkpointed:
            insert_checkpoints(net, GROUPS[groups])
        with recomputations() as recomputed:
            seen = [USES[name](net), USES[name](net)] if "hooks" not in name else USES[name](net)
        gradients = [parameter.grad for parameter in net.parameters()]
        outcomes.append([seen, gradients, dict(net.state_dict()), torch.get_rng_state()])
    assert recomputed
    assert_identical(*outcomes)


def test_hooks_of_a_recomputed_module_run_once_and_those_within_it_twice() -> None:
    net = _Net()
    insert_checkpoints(net, GROUPS["each"])
    calls: list[str] = []
    net.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    net.blocks[0].layer.register_forward_hook(lambda *_: calls.append("layer"))
    net(_x()).sum().backward()
    assert calls == ["layer", "block", "layer"]


def test_a_block_that_nothing_needs_is_not_recomputed() -> None:
    net = _Net()
    insert_checkpoints(net, GROUPS["each"])
    with recomputations() as recomputed:
        hidden = net.hidden(_x())
        hidden[1].sum().backward()
        F.mse_loss(hidden[2].detach(), _x())
    assert recomputed == ["blocks.0"]
