"""Calls that do what the first one did not: an error where they could not run again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain import insert_checkpoints
from lightning_memtrain.checkpointing import Recomputed, SelectiveOps
from tests.helpers.recomputed import assert_identical, recomputations


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


class AssignsLate(Late):
    """A number, a hidden state, a new attribute, and what containers hold: the result depends on each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.hidden: Tensor | None = None
        self.factors = [1.0]
        self.inner = nn.Identity()
        self.inner.sizes = {"all": 2.0}

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        x = self.linear(x * self.scale) * sum(self.factors) * self.inner.sizes["all"]
        if self.hidden is not None:
            x = x * self.hidden
        if hasattr(self, "shift"):
            x = x * self.shift
        if late:
            self.scale *= 0.5
            self.hidden = x.detach().tanh()
            self.factors.append(3.0)
            self.inner.sizes["all"] *= 0.5
            self.shift = 5.0
        return x.tanh()


def test_what_a_later_call_is_the_first_to_assign_is_as_it_was() -> None:
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([AssignsLate()])
        if checkpointed:
            insert_checkpoints(model, [[Recomputed("0")]])
        x, seen = torch.ones(2, 3), []
        with recomputations() as recomputed:
            for late in (False, True, False, True, True):
                model[0](x, late=late).sum().backward()
                seen.append([parameter.grad.clone() for parameter in model.parameters()])
            pair = model[0](x, late=True), model[0](x, late=True)  # before the backward of either
            (pair[0].sum() - 3 * pair[1].sum()).backward()
        block = model[0]
        seen.append([parameter.grad for parameter in model.parameters()])
        seen.append([block.scale, block.hidden, block.factors, block.inner.sizes, block.shift])
        outcomes.append(seen)
    assert recomputed == ["0"] * 7
    assert_identical(*outcomes)


class FillsLate(Late):
    """Writes to a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(3)

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        x = self.linear(x * self.scale).tanh()
        if late:
            self.scale.mul_(0.5)
        return x


def test_a_call_that_begins_to_write_to_an_attribute_is_refused() -> None:
    model = nn.ModuleList([FillsLate()])
    insert_checkpoints(model, [[Recomputed("0")]])
    model[0](torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        model[0](torch.ones(2, 3), late=True)
    assert str(caught.value) == (
        "`ActivationCheckpointing` cannot recompute '0': its forward changes attribute 'scale' in place, "
        "which it did not in its first call. Let it make a new tensor, or leave this module out."
    )
    model[0](torch.ones(2, 3)).sum().backward()  # the next one is as good as ever


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
