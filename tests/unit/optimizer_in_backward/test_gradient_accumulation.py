"""Which optimizers can take up gradients one by one, and that SGD with momentum does it exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.optimizer_in_backward import Accumulation, AdamA, ExactMomentum
from lightning_memtrain.optimizer_in_backward.backward_steps import BackwardSteps
from lightning_memtrain.optimizer_steps import step_parameter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"dampening": 0.3},
        {"dampening": 0.3, "weight_decay": 0.1},
        {"lr": torch.tensor(0.05)},
    ],
    ids=str,
)
def test_momentum_on_accumulated_gradients(options: dict[str, Any]) -> None:
    def layer() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(6, 3).double()

    one, other = layer(), layer()
    make = lambda ps: torch.optim.SGD(ps, **{"lr": 0.05, "momentum": 0.9} | options)  # noqa: E731
    optimizer, reference = make(one.parameters()), make(other.parameters())
    steps = BackwardSteps(optimizer, step_parameter, ExactMomentum())
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        reference.zero_grad()
        for number in range(4):
            batch = torch.randn(5, 6, generator=generator).double()
            other(batch).square().mean().backward()
            loss = one(batch).square().mean()
            steps.begin(loss, last=number == 3)
            loss.backward()
            steps.end()
        reference.step()
        steps.finish()
        optimizer.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        mine, plain = optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14)
        assert p.grad is None


REFUSED: dict[str, tuple[Accumulation, Any, str]] = {
    "Adam's momentum": (
        ExactMomentum(),
        lambda p: torch.optim.AdamW(p),
        r"got AdamW. Use accumulation=AdamA",
    ),
    "RMSprop's": (ExactMomentum(), lambda p: torch.optim.RMSprop(p), "got RMSprop. Leave out `accumulate"),
    "no momentum": (ExactMomentum(), lambda p: torch.optim.SGD(p, 0.1), "got momentum=0"),
    "Nesterov": (
        ExactMomentum(),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        "Use nesterov=False",
    ),
    "dampening": (
        ExactMomentum(),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=1),
        "dampening=1",
    ),
    "maximize": (ExactMomentum(), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, maximize=True), "maximize"),
    "SGD's": (AdamA(), lambda p: torch.optim.SGD(p, 0.1), r"got SGD. Use accumulation=ExactMomentum"),
    "amsgrad": (AdamA(), lambda p: torch.optim.AdamW(p, amsgrad=True), "got amsgrad"),
    "decay": (AdamA(), lambda p: torch.optim.Adam(p, weight_decay=0.1), "use torch.optim.AdamW"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_up_is_refused(name: str) -> None:
    accumulation, make, message = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=message):
        accumulation.check(make([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize("accumulation", [ExactMomentum(), AdamA()])
def test_half_precision_has_no_room_to_add_up(accumulation: Accumulation) -> None:
    weights = [nn.Parameter(torch.ones(2).bfloat16())]
    optimizer: Any = torch.optim.SGD(weights, 0.1, momentum=0.9)
    if isinstance(accumulation, AdamA):
        optimizer = torch.optim.AdamW(weights)
    with pytest.raises(MisconfigurationException, match="needs weights in float32"):
        accumulation.check(optimizer)
