"""Beside torch's own checkpoint: its bytes where nothing is to be protected, exact where it is not.

Where torch becomes exact in one of these, docs/checkpointing.md and the choice of one engine are to be
thought over.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_memtrain import MemoryLedger
from lightning_memtrain.checkpointing import Recomputed, insert_checkpoints

Insert = Callable[[nn.Module], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen = 0
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.factor(x)).square()

    def factor(self, x: Tensor) -> float:
        return 1.0


class DrawsFromPython(Block):
    def factor(self, x: Tensor) -> float:
        return 1 + random.random()


class DrawsFromNumpy(Block):
    def factor(self, x: Tensor) -> float:
        return 1 + float(numpy.random.rand())


class CountsInALaterCall(Block):
    def factor(self, x: Tensor) -> float:
        self.seen += int(x[0, 0] > 1)
        return 1.0 + self.seen


class GathersInALaterCall(Block):
    def factor(self, x: Tensor) -> float:
        self.history += [1] * int(x[0, 0] > 1)
        return 1.0 + len(self.history)


def by_torch(model: nn.Module) -> None:
    own = model[0].forward
    model[0].forward = lambda x: checkpoint(own, x, use_reentrant=False)


def by_us(model: nn.Module) -> None:
    insert_checkpoints(model, [[Recomputed("0")]])


def trained(kind: type[Block], insert: Insert, *, changes_weight: bool = False) -> list[Any]:
    """Gradients of four steps, and what is left of them; the last two have another batch."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    model = nn.Sequential(kind(), nn.Linear(8, 1))
    insert(model)
    seen: list[Any] = []
    for factor in (0.1, 0.2, 3.0, 4.0):
        loss = model(torch.full((2, 8), factor)).sum()
        if changes_weight:
            with torch.no_grad():
                model[0].linear.weight.mul_(2)
        loss.backward()
        seen += [parameter.grad.tolist() for parameter in model.parameters()]
        model.zero_grad()
    return [*seen, model[0].seen, model[0].history, random.random(), numpy.random.rand()]


WITH_STATE = [DrawsFromPython, DrawsFromNumpy, CountsInALaterCall, GathersInALaterCall]


@pytest.mark.parametrize("kind", [Block, *WITH_STATE])
def test_steps_are_those_without_checkpoints(kind: type[Block]) -> None:
    assert trained(kind, by_us) == trained(kind, lambda model: None)


@pytest.mark.parametrize("kind", WITH_STATE)
def test_torch_trains_something_else_and_does_not_say_so(kind: type[Block]) -> None:
    assert trained(Block, by_torch) == trained(Block, lambda model: None)
    assert trained(kind, by_torch) != trained(kind, lambda model: None)


def test_a_weight_that_changes_before_backward_is_refused_and_taken_by_torch() -> None:
    plain = trained(Block, lambda model: None, changes_weight=True)
    assert trained(Block, by_torch, changes_weight=True) != plain
    with pytest.raises(
        RuntimeError, match=r"cannot recompute '0': its parameter 'linear\.weight' was changed"
    ):
        trained(Block, by_us, changes_weight=True)


def test_a_block_without_state_holds_a_bias_gradient_more_than_under_torch() -> None:
    peaks = []
    for insert in (by_us, by_torch):
        torch.manual_seed(0)
        block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        model = nn.Sequential(block, nn.Linear(32, 1))
        insert(model)
        batch = torch.randn(64, 32)
        for _ in range(2):
            with MemoryLedger(model, inputs=[batch]) as ledger:
                model(batch).sum().backward()
            model.zero_grad()
        peaks.append(ledger.breakdown().ledger_peak_bytes)
    # A node of the graph may ask twice for what it saved, so that stays until its gradients are made; torch
    # lets go of it when it is asked for, and refuses to give it again.
    assert peaks[0] - peaks[1] == block[3].bias.nbytes
