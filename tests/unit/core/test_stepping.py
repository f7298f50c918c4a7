"""One parameter stepped by an optimizer's own code."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.core.stepping import (
    changed_shared_state,
    shared_state,
    step_parameter,
)

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW, foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_one_by_one_are_all_at_once(name: str) -> None:
    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2))]

    one, other = parameters(), parameters()
    in_parts, whole = OPTIMIZERS[name](one), OPTIMIZERS[name](other)
    calls: list[str] = []
    in_parts.register_step_pre_hook(lambda *_: calls.append("pre"))
    in_parts.register_step_post_hook(lambda *_: calls.append("post"))
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(one, other, strict=True):
            q.grad = torch.randn(p.shape, generator=generator)
            p.grad = q.grad.clone()
        for p in (one[2], one[0], one[1]):
            step_parameter(in_parts, p)
        whole.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert all(p.grad is not None for p in one)
    assert calls == []
    assert len(in_parts._optimizer_step_pre_hooks) == 1


def test_state_across_parameters_is_found() -> None:
    class Counts(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1

    parameter = nn.Parameter(torch.ones(2))
    optimizer = Counts([parameter], lr=0.1)
    before = shared_state(optimizer)
    parameter.grad = torch.ones(2)
    step_parameter(optimizer, parameter)
    assert changed_shared_state(before, optimizer) == ["param_groups[0]['k']"]


def test_optimizers_that_evaluate_once_get_their_closure_and_others_are_refused() -> None:
    class Once(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            assert closure is not None
            closure()  # type: ignore[operator]
            super().step()

    class Twice(Once):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            closure()  # type: ignore[operator]
            super().step(closure)

    class Never(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]
            super().step()

    for kind in (Once, Never):
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        step_parameter(kind([parameter], lr=0.5), parameter)
        assert parameter.tolist() == [0.5, 0.5]
    with pytest.raises(
        MisconfigurationException,
        match=r"without evaluating the model, but got Twice: its closure is called again.*Use another",
    ):
        step_parameter(Twice([parameter], lr=0.5), parameter)


def test_optimizers_without_hooks_of_their_own() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            self.optimizer.step()

    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    step_parameter(Wrapper(torch.optim.SGD([parameter], lr=0.5)), parameter)
    assert parameter.tolist() == [0.5, 0.5]
