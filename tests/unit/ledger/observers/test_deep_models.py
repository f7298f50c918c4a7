"""What a model may nest, it may nest under a ledger."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_memtrain import MemoryLedger


class Nest(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Nest(depth - 1) if depth else nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Recursive(nn.Module):
    """As a network over trees calls itself for each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        return self(x, depth - 1) if depth else self.leaf(x)


def deepest_plain(model: nn.Module, *args: object) -> int:
    """Frames that a forward needs, found by lowering the limit until it no longer suffices."""
    limit = sys.getrecursionlimit()
    try:
        for lower in range(limit - 10, 0, -10):
            sys.setrecursionlimit(lower)
            model(*args)
    except RecursionError:
        return lower + 10
    finally:
        sys.setrecursionlimit(limit)
    raise AssertionError


@pytest.mark.parametrize(
    ("model", "args"), [(Nest(200), ()), (nn.Sequential(Recursive()), (200,))], ids=["nested", "recursive"]
)
def test_a_model_that_just_runs_without_a_ledger_runs_with_one(
    model: nn.Module, args: tuple[int, ...]
) -> None:
    model = model[0] if args else model
    holder = nn.ModuleDict({"model": model})
    x = torch.ones(2, 4)
    limit = sys.getrecursionlimit()
    just_enough = deepest_plain(model, x, *args)
    sys.setrecursionlimit(just_enough)
    try:
        with MemoryLedger(holder, inputs=x) as ledger:
            model(x, *args).sum().backward()
        assert sys.getrecursionlimit() == just_enough
    finally:
        sys.setrecursionlimit(limit)
    breakdown = ledger.breakdown()
    leaf = ".".join(["model", *["inner"] * 201]) if not args else "model.leaf"
    assert {row.name: row.gradients_bytes for row in breakdown.modules}.keys() >= {leaf}
    assert sum(event.name.startswith("forward") for event in breakdown.timeline) == 202


def test_the_limit_is_as_it_was_also_when_ledgers_are_left_in_the_order_of_their_entering() -> None:
    limit = sys.getrecursionlimit()
    first, second = MemoryLedger(Nest(3)), MemoryLedger(Nest(3))
    first.__enter__()
    second.__enter__()
    assert sys.getrecursionlimit() > limit
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert sys.getrecursionlimit() == limit
