"""Stepping in backward, in a loop without a Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_memtrain.optimizer_in_backward import AdamA, ExactMomentum, step_in_backward
from lightning_memtrain.precision import SGD8bit


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches() -> Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("clipping", ["none", "value", "norm"])
def test_weights_are_those_of_a_plain_loop(clipping: str) -> None:
    model = network()
    plain = copy.deepcopy(model)
    optimizer, reference = sgd(model), sgd(plain)
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    reference_scheduler = torch.optim.lr_scheduler.StepLR(reference, step_size=2)
    stepping = step_in_backward(optimizer, clip_value=0.01 if clipping == "value" else None)
    for batch in batches():
        reference.zero_grad()
        plain(batch).square().mean().backward()
        if clipping == "value":
            nn.utils.clip_grad_value_(plain.parameters(), 0.01)
        if clipping == "norm":
            nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        reference.step()
        reference_scheduler.step()
        stepping.backward(model(batch).square().mean(), max_norm=0.05 if clipping == "norm" else None)
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
        optimizer.step()
        scheduler.step()
    assert_equal(model, plain)
    assert stepping.num_stepped == 16
    assert seen == ["step"] * 4


def test_microbatches_are_accumulated() -> None:
    model = network().double()
    plain = copy.deepcopy(model)
    stepping, reference = step_in_backward(sgd(model), accumulation=ExactMomentum()), sgd(plain)
    for batch in batches().double():
        reference.zero_grad()
        plain(batch).square().mean().backward()
        reference.step()
        for number, sample in enumerate(batch):
            stepping.backward(model(sample).square().mean() / len(batch), last=number == len(batch) - 1)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_step_of_ones_own() -> None:
    model = network()
    stepped: list[Tensor] = []
    stepping = step_in_backward(sgd(model), step_parameter=lambda _, parameter: stepped.append(parameter))
    stepping.backward(model(batches()[0]).sum())
    assert {id(p) for p in stepped} == {id(p) for p in model.parameters()}
    assert stepping.num_stepped == len(stepped) == 4


def test_a_backward_that_fails_leaves_no_hooks() -> None:
    model = network()
    stepping = step_in_backward(sgd(model))
    loss = model(batches()[0]).sum()
    loss.backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        stepping.backward(loss)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    stepping.backward(model(batches()[0]).sum())
    assert stepping.num_stepped == 4


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"clip_value": 0.0}, ValueError, r"must be greater than 0, but got clip_value=0.0. Leave it out"),
        (
            {"accumulation": ExactMomentum(), "clip_value": 1.0},
            ValueError,
            r"accumulation=ExactMomentum\(\)\)` cannot clip.*got clip_value=1.0. Leave out one of them",
        ),
        (
            {"accumulation": AdamA()},
            MisconfigurationException,
            r"needs torch.optim.Adam or AdamW, but got SGD",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        step_in_backward(sgd(network()), **arguments)


def test_backwards_that_do_not_go_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"`backward\(last\)` must be True.*Use `accumulation=ExactMomentum"):
        step_in_backward(sgd(model)).backward(model(batches()[0]).sum(), last=False)
    with pytest.raises(
        ValueError, match=r"`backward\(last\)` must be True.*Use SGD with momentum or AdamW, or one"
    ):
        step_in_backward(SGD8bit(model.parameters())).backward(model(batches()[0]).sum(), last=False)
    for max_norm, accumulation in ((0.0, None), (1.0, ExactMomentum())):
        with pytest.raises(ValueError, match=rf"but got max_norm={max_norm} and accumulation={accumulation}"):
            step_in_backward(sgd(model), accumulation=accumulation).backward(
                model(batches()[0]).sum(), max_norm=max_norm
            )


def test_optimizers_that_cannot_be_stepped_in_parts_are_refused() -> None:
    model = network()
    with pytest.raises(
        MisconfigurationException, match=r"each parameter by itself.*LBFGS: it calls a closure"
    ):
        step_in_backward(torch.optim.LBFGS(model.parameters()))


def test_what_begins_to_count_later_is_refused_by_name() -> None:
    class Late(torch.optim.SGD):
        late = False

        def step(self, closure: Any = None) -> Any:
            if self.late:
                self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
            return super().step(closure)

    model = network()
    optimizer = Late(model.parameters(), lr=0.1)
    stepping = step_in_backward(optimizer)
    for _ in range(2):
        stepping.backward(model(batches()[0]).sum())
    optimizer.late = True
    with pytest.raises(
        MisconfigurationException, match=r"Late: its step changes param_groups\[0\]\['k'\]\. Use"
    ):
        stepping.backward(model(batches()[0]).sum())
