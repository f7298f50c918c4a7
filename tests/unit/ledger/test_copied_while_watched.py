"""A model that is copied or pickled while a ledger watches it, as averages of weights are made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_memtrain.ledger import MemoryLedger


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_followed_by_nobody(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.ones(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    with MemoryLedger(model, optimizer, batch) as ledger:
        model(batch).sum().backward()
        optimizer.step()
        average = copied(model)
        assert torch.equal(average(batch), model(batch))
    names = [event.name for event in ledger.breakdown().timeline]
    assert names.count("forward 0") == 2  # of the model's own two forwards
    assert torch.equal(average(batch), model(batch))
