"""Which optimizers may be stepped in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_memtrain.optimizer_steps import SharedState, step_parameter, why_no_partial_steps


class Counts(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


class Insists(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        super().step(closure)


def test_state_across_parameters_shows_once_parameters_are_stepped() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = Counts([parameter], lr=0.1)
    before = SharedState(optimizer)
    assert why_no_partial_steps(optimizer) is why_no_partial_steps(optimizer, before) is None
    step_parameter(optimizer, parameter)
    assert why_no_partial_steps(optimizer, before) == "its step changes param_groups[0]['k']"
    assert why_no_partial_steps(optimizer) is None


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_what_treats_each_parameter_by_itself_has_no_reason(kind: type[torch.optim.Optimizer]) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = kind([parameter], lr=0.1)
    before = SharedState(optimizer)
    step_parameter(optimizer, parameter)
    assert why_no_partial_steps(optimizer, before) is None


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Insists])
def test_a_closure_is_seen_before_any_step(kind: Any) -> None:
    assert why_no_partial_steps(kind([nn.Parameter(torch.ones(2))], lr=0.1)) == "it calls a closure"


def test_a_reason_names_four_paths_at_most() -> None:
    optimizer: Any = Counts([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.seen = {}
    before = SharedState(optimizer)
    optimizer.seen.update(dict.fromkeys("abcdef", 1))
    assert why_no_partial_steps(optimizer, before) == (
        "its step changes seen['a'], seen['b'], seen['c'], seen['d'] and 2 more"
    )
