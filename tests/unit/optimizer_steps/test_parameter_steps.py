"""One parameter stepped by an optimizer's own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.optimizer_steps.parameter_steps import step_parameter, step_parameters

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


def test_optimizers_that_evaluate_once_get_their_closure_and_others_are_refused() -> None:
    class Once(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            if closure is not None:
                closure()  # type: ignore[operator]
            super().step()

    class Insists(Once):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            assert closure is not None
            super().step(closure)

    class Twice(Once):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            if closure is not None:
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
    refused = {Insists: "it calls a closure", Twice: "its closure is called again within a step"}
    for kind, reason in refused.items():
        with pytest.raises(
            MisconfigurationException,
            match=rf"without evaluating the model, but got {kind.__name__}: {reason}\. Use another",
        ):
            step_parameter(kind([parameter], lr=0.5), parameter)
    with pytest.raises(MisconfigurationException, match=r"got LBFGS: it calls a closure\. Use another"):
        step_parameter(torch.optim.LBFGS([parameter]), parameter)
    assert parameter.tolist() == [0.5, 0.5]


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


def small_parameters(num: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(num)]
    for parameter in found:
        parameter.grad = torch.randn(3, generator=generator)
    return found


class ByPlace(torch.optim.SGD):
    """Knows parameters by their place in the groups, as some libraries' optimizers do."""

    def step(self, closure: Any = None) -> None:
        for i, group in enumerate(self.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.1 * (10 * i + j))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, ByPlace])
def test_some_parameters_of_several_groups_step_as_in_a_whole_step(kind: type[torch.optim.Optimizer]) -> None:
    whole, parts = small_parameters(7), small_parameters(7)

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return kind([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.3}], lr=0.1)

    reference, optimizer = make(whole), make(parts)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    gradients = [parameter.grad for parameter in parts]
    for _ in range(2):
        reference.step()
        for some in ([0, 4, 2], [1], [6, 5, 3]):
            step_parameters(optimizer, [parts[i] for i in some])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
    for group, expected in zip(optimizer.param_groups, groups, strict=True):
        assert all(one is other for one, other in zip(group["params"], expected, strict=True))
    assert all(parameter.grad is gradient for parameter, gradient in zip(parts, gradients, strict=True))


def test_parameters_of_a_group_that_is_added_later_are_found() -> None:
    parameters = small_parameters(3)
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:2]}], lr=1.0)
    step_parameters(optimizer, parameters[:2])
    optimizer.add_param_group({"params": parameters[2:]})
    before = [parameter.detach().clone() for parameter in parameters]
    step_parameters(optimizer, parameters[2:])
    moved = [not torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)]
    assert moved == [False, False, True]


def test_a_step_that_fails_leaves_groups_as_they_were() -> None:
    first, second = small_parameters(2)
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError):
        step_parameters(optimizer, [second])
    assert optimizer.param_groups[0]["params"] == [first, second]
