"""Recomputed activations are recognised, whichever way `torch.utils.checkpoint` is used."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_memtrain.core import Category
from lightning_memtrain.ledger import MemoryLedger

WIDTH_BYTES = 16 * 32 * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32, bias=False)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(self.linear(x))


class Chain(nn.Module):
    def __init__(self, use_reentrant) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            x = (
                block(x)
                if self.use_reentrant is None
                else checkpoint(block, x, use_reentrant=self.use_reentrant)
            )
        return x


def step(use_reentrant):
    torch.manual_seed(0)
    model = Chain(use_reentrant)
    x = torch.ones(16, 32, requires_grad=True)
    with MemoryLedger(model, inputs=x) as ledger:
        model(x).sum().backward()
    return ledger.breakdown()


def test_without_checkpointing_nothing_is_recomputed():
    breakdown = step(None)
    assert breakdown.recomputed_max_bytes == 0
    assert breakdown.maxima[Category.ACTIVATIONS] == 3 * WIDTH_BYTES


@pytest.mark.parametrize("early_stop", [True, False])
def test_non_reentrant(early_stop):
    with set_checkpoint_early_stop(early_stop):
        breakdown = step(False)
    # One block at a time is recomputed; its tanh output is all that it saves.
    assert breakdown.recomputed_max_bytes == WIDTH_BYTES
    # In forward each block saves its input alone (the first one's is the batch), and in backward one more.
    assert breakdown.maxima[Category.ACTIVATIONS] == 3 * WIDTH_BYTES


def test_reentrant():
    breakdown = step(True)
    assert breakdown.recomputed_max_bytes == WIDTH_BYTES


def test_a_function_that_calls_no_module():
    parameter = nn.Linear(1, 1)
    x = torch.ones(16, 32, requires_grad=True)
    with MemoryLedger(parameter, inputs=x) as ledger:
        checkpoint(lambda t: t.sin().exp().tanh(), x, use_reentrant=False).sum().backward()
    # sin's result is not saved; those of exp and tanh are.
    assert ledger.breakdown().recomputed_max_bytes == 2 * WIDTH_BYTES


def test_the_timeline_names_recomputed_and_backward_modules():
    torch.manual_seed(0)
    model = Chain(False)
    x = torch.ones(16, 32, requires_grad=True)
    with MemoryLedger(model, inputs=x) as ledger:
        model(x).sum().backward()
    names = [event.name for event in ledger.breakdown().timeline]
    assert names.count("forward blocks.2.act") == 2  # once in forward, once in recomputation
    assert names.count("backward blocks.2.act") == 1


def test_backward_inside_of_a_modules_forward_is_no_recomputation():
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            self.inner(x).tanh().sum().backward()
            return x

    model = nn.Sequential(Step())
    with MemoryLedger(model) as ledger:
        model(torch.ones(2, 4))
    assert ledger.breakdown().recomputed_max_bytes == 0


def test_second_order_backward_is_no_recomputation():
    model = nn.Linear(4, 4)
    x = torch.ones(2, 4, requires_grad=True)
    with MemoryLedger(model) as ledger:
        (grad,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert ledger.breakdown().recomputed_max_bytes == 0
