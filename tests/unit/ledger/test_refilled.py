"""Storages that are emptied and filled again, as sharded training gathers weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import Category
from lightning_memtrain.ledger import OpWorkspace

KIB = 1024


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 4)  # 80 bytes


def emptied(num_bytes: int) -> torch.Tensor:
    tensor = torch.zeros(num_bytes // 4)
    tensor.untyped_storage().resize_(0)
    return tensor


def fill(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.numel() * 4)
    tensor.fill_(1.0)


def make_and_free(num_bytes: int) -> None:
    torch.empty(num_bytes // 4).fill_(1)


def test_a_storage_that_was_empty_is_live_from_when_it_is_filled(model: nn.Module) -> None:
    gathered = emptied(4 * KIB)
    with MemoryLedger(model) as ledger:
        before = ledger.current_bytes
        make_and_free(10 * KIB)
        fill(gathered)
        assert ledger.current_bytes - before == 4 * KIB
        gathered.untyped_storage().resize_(0)
        assert ledger.current_bytes == before
    breakdown = ledger.breakdown()
    assert breakdown.ledger_peak_bytes == 80 + 10 * KIB
    assert breakdown.start_bytes == breakdown.end_bytes == 80
    assert (breakdown.maxima[Category.INPUTS], breakdown.maxima[Category.TEMPORARY]) == (0, 10 * KIB)


@pytest.mark.parametrize("num_times", [1, 2, 3])
def test_it_may_be_filled_again_and_again_and_be_an_argument_while_empty(
    model: nn.Module, num_times: int
) -> None:
    gathered = emptied(4 * KIB)
    with MemoryLedger(model) as ledger:
        gathered.detach()  # seen with 0 bytes
        for _ in range(num_times):
            make_and_free(10 * KIB)
            fill(gathered)
            gathered.untyped_storage().resize_(0)
    assert ledger.breakdown().ledger_peak_bytes == 80 + 10 * KIB


def test_a_storage_that_shows_up_by_being_emptied_was_live_until_then(model: nn.Module) -> None:
    gathered = torch.zeros(KIB)
    with MemoryLedger(model) as ledger:
        gathered.untyped_storage().resize_(0)
        make_and_free(2 * KIB)
    breakdown = ledger.breakdown()
    assert breakdown.start_bytes == 80 + 4 * KIB
    assert breakdown.ledger_peak_bytes == 80 + 4 * KIB
    assert breakdown.end_bytes == 80


class Gathers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["gathered"] = emptied(4 * KIB)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fill(self.gathered)
        return x * self.gathered  # saved for the gradient of x


def test_what_fills_it_is_the_module_at_work_and_no_activation_and_no_growth(model: nn.Module) -> None:
    model.add_module("gathers", Gathers())
    x = torch.ones(KIB, requires_grad=True)
    with MemoryLedger(model, inputs=x) as ledger:
        output = model.gathers(x)
    breakdown = ledger.breakdown()
    (row,) = [row for row in breakdown.modules if row.name == "gathers"]
    assert (row.produced_bytes, row.saved_bytes) == (2 * 4 * KIB, 0)
    assert breakdown.maxima[Category.TEMPORARY] == 2 * 4 * KIB
    assert breakdown.maxima[Category.ACTIVATIONS] == 0
    assert [(row.module, row.num_bytes) for row in breakdown.growth] == [("gathers", output.nbytes)]
    (survivor,) = ledger.survivors()
    assert survivor.num_bytes == output.nbytes


def test_the_predicted_peak_follows(model: nn.Module) -> None:
    gathered = emptied(4 * KIB)
    with MemoryLedger(model, workspace=OpWorkspace("cpu")) as ledger:
        make_and_free(10 * KIB)
        fill(gathered)
        gathered.untyped_storage().resize_(0)
    assert ledger.predicted_peak_bytes == 80 + 10 * KIB


def test_storages_on_other_devices_are_passed_over(model: nn.Module) -> None:
    elsewhere = torch.empty(KIB, device="meta")
    with MemoryLedger(model) as ledger:
        elsewhere.untyped_storage().resize_(8 * KIB)
    assert ledger.breakdown().ledger_peak_bytes == 80
