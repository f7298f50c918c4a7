"""Optimizers that evaluate the model during their step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_memtrain.optimizer_steps.closures import (
    EvaluatedClosure,
    EvaluatesModelError,
    needs_closure,
    takes_closure,
)


class Base(torch.optim.SGD):
    def __init__(self, parameters: Any = None) -> None:
        super().__init__([nn.Parameter(torch.ones(2))] if parameters is None else parameters, lr=0.1)


class Sharpness(Base):
    """Evaluates twice, whether it is told how or not."""

    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=0.05)
        closure()
        super().step()
        return loss


class Asserts(Base):
    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "needs a closure"
        return super().step(closure)


class Raises(Base):
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise RuntimeError("needs a closure")
        return super().step(closure)


class Required(Base):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


class Branches(Base):
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            super().step()
            return closure()
        return super().step()


class Conditional(Base):
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        super().step()
        return loss


class Returns(Base):
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            return super().step()
        loss = closure()
        super().step()
        return loss


class Substitutes(Base):
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            closure = float
        return closure()


class Rejects(Base):
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise RuntimeError("takes no closure")
        return super().step()


class Tries(Base):
    def step(self, closure: Any = None) -> Any:
        try:
            return closure()
        except TypeError:
            return super().step()


class Bare(Base):
    def step(self) -> Any:  # type: ignore[override]
        return super().step()


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sharpness, Asserts, Raises, Required])
def test_those_that_cannot_do_without(kind: Any) -> None:
    assert needs_closure(kind([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize(
    "kind", [Base, torch.optim.Adam, Branches, Conditional, Returns, Substitutes, Rejects, Tries, Bare]
)
def test_those_that_can(kind: Any) -> None:
    assert not needs_closure(kind([nn.Parameter(torch.ones(2))]))


def test_a_step_without_a_file_is_not_judged_by_its_text() -> None:
    names: dict[str, Any] = {"Base": Base}
    exec("class Made(Base):\n    def step(self, closure=None):\n        return closure()", names)
    assert not needs_closure(names["Made"]())


def test_whether_a_closure_can_be_handed_over() -> None:
    assert takes_closure(Base())
    assert takes_closure(Sharpness())
    assert not takes_closure(Bare())


def parameter() -> nn.Parameter:
    made = nn.Parameter(torch.ones(2))
    made.grad = torch.ones(2)
    return made


def test_a_spent_closure_gives_its_result_once() -> None:
    one, loss = parameter(), torch.tensor(0.5)
    optimizer = torch.optim.SGD([one], lr=0.5)
    assert optimizer.step(EvaluatedClosure(loss, [one])) is loss
    assert one.tolist() == [0.5, 0.5]
    with pytest.raises(EvaluatesModelError, match="its closure is called again within a step"):
        Sharpness([one]).step(EvaluatedClosure(loss, [one]))


def test_a_spent_closure_is_not_to_be_called_where_it_would_give_something_else() -> None:
    one = parameter()
    closure = EvaluatedClosure(None, [one])
    with torch.no_grad():
        one.add_(1)
    with pytest.raises(EvaluatesModelError, match="its closure is called after weights have changed"):
        closure()
    for change in (lambda p: p.grad.zero_(), lambda p: setattr(p, "grad", None)):
        one = parameter()
        closure = EvaluatedClosure(None, [one])
        change(one)
        with pytest.raises(EvaluatesModelError, match="its closure is called after gradients have changed"):
            closure()
