"""What to recompute in a loop of plain torch: within a limit, counted to the byte."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_memtrain import MemoryLedger
from lightning_memtrain.checkpointing import RecomputationPlan, insert_checkpoints, plan_recomputation


class Plain:
    """Eight blocks that keep two tensors each, SGD with momentum, and one batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Sigmoid()) for _ in range(8))
        self.model = nn.Sequential(*blocks)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.batch = torch.randn(256, 32)

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(batch).square().mean()

    def step(self) -> None:
        self.loss(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plan(self, limit: int | str | None) -> RecomputationPlan:
        return plan_recomputation(self.model, self.loss, [self.batch], [self.optimizer], limit=limit)


def test_a_limit_is_kept_and_its_bytes_are_those_of_the_real_step() -> None:
    plain = Plain()
    roomy = plain.plan("1GiB")
    assert roomy.groups == []
    plan = plain.plan(roomy.peak_bytes - 64 * 2**10)
    assert plan.groups
    assert plan.fits(roomy.peak_bytes - 64 * 2**10)
    assert plan.plain_peak_bytes == roomy.peak_bytes
    remove = insert_checkpoints(plain.model, plan.groups)
    plain.step()
    with MemoryLedger(plain.model, plain.optimizer, [plain.batch]) as ledger:
        plain.step()
    remove()
    assert ledger.breakdown().ledger_peak_bytes == plan.breakdown.ledger_peak_bytes


def test_planning_leaves_no_trace() -> None:
    plain, other = Plain(), Plain()
    other.plan(None)
    assert not other.optimizer.state
    assert all(parameter.grad is None for parameter in other.model.parameters())
    for one in (plain, other):
        one.step()
        one.step()
    for expected, parameter in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_without_a_limit_tensors_alone_count() -> None:
    plain = Plain()
    plan = plain.plan(None)
    plain.step()
    with MemoryLedger(plain.model, plain.optimizer, [plain.batch]) as ledger:
        plain.step()
    assert plan.plain_peak_bytes == ledger.breakdown().ledger_peak_bytes
    assert plan.peak_bytes == plan.breakdown.peak_bytes


def test_what_cannot_be_planned_is_refused() -> None:
    plain = Plain()
    with pytest.raises(MisconfigurationException, match=r"`MemoryBudget\(limit\)` must be at least "):
        plain.plan(1000)
    with pytest.raises(MisconfigurationException, match=r"`plan_recomputation\(limit\)` must be a num"):
        plain.plan("much")
    with pytest.raises(MisconfigurationException, match=r"`plan_recomputation\(step\)` must return a loss"):
        plan_recomputation(plain.model, lambda batch: None, [plain.batch])
