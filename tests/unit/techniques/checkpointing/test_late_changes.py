"""Calls that do what the first one did not: an error where they could not run again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain import Recomputed, SelectiveOps, insert_checkpoints


class Late(nn.Module):
    """From its second call on it does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        raise NotImplementedError


class WritesLate(Late):
    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        return self.linear(x.mul_(2) if late else x)


class LooksBackLate(Late):
    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        out = self.linear(x).tanh()
        if late:
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return out + slope
        return out


def test_a_model_is_pickled_amid_selective_recomputation() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2)))
    policy = SelectiveOps()
    insert_checkpoints(model, policy.groups(model), policy.contexts)
    twin = pickle.loads(pickle.dumps(model))
    for one in (model, twin):
        one(torch.ones(2, 3)).sum().backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_a_call_that_begins_to_write_to_its_argument_is_refused() -> None:
    model = nn.ModuleList([WritesLate()])
    insert_checkpoints(model, [[Recomputed("0")]])
    model[0](torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        model[0](torch.ones(2, 3), late=True)
    assert str(caught.value) == (
        "`ActivationCheckpointing` cannot recompute '0': its forward changes argument 1 in place, which it "
        "did not in its first call. Let it make a new tensor, or leave this module out."
    )
    model[0](torch.ones(2, 3)).sum().backward()  # the next one is as good as ever


def test_a_call_that_begins_to_run_a_backward_is_refused() -> None:
    model = nn.ModuleList([LooksBackLate()])
    insert_checkpoints(model, [[Recomputed("0")]])
    x = torch.ones(2, 3, requires_grad=True)
    model[0](x).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        model[0](x, late=True)
    assert str(caught.value) == (
        "`ActivationCheckpointing` cannot run '0': its forward runs a backward of its own, which it did not "
        "in its first call. Leave this module out."
    )
    model[0](x).sum().backward()
