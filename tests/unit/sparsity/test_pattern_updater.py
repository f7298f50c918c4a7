"""Sparse training in a plain loop, without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

import lightning_memtrain as mt
from lightning_memtrain.sparsity import PatternUpdater, RunLength, Select, random_positions
from tests.helpers.trainers import LIGHTNING_WARNINGS
from tests.unit.sparsity.test_sparse_training import EVERY_TWO, METHODS, NUM_BATCHES, Net, assert_same, fit

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "StaticSparse"])
def test_a_plain_loop_trains_as_the_callback(name: str, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model, method = Net(), METHODS[name]()
    weights = mt.sparsify_(model, random_positions(model, method))
    optimizer: Any = model.configure_optimizers()
    updater = PatternUpdater(weights, method)
    steps = EVERY_TWO.in_steps(RunLength(total_steps=2 * NUM_BATCHES))
    for step, batch in enumerate([*model.train_dataloader(), *model.train_dataloader()], start=1):
        now = method.update_time(step, steps)
        if steps.is_due(step):
            updater.watch(now)
        optimizer.zero_grad()
        model.loss(batch).backward()
        updater.record_gradients()
        optimizer.step()
        if steps.is_due(step):
            updater.update(now, [optimizer])
    trained, _ = fit(tmp_path, mt.SparseTraining(METHODS[name](), EVERY_TWO))
    assert_same(model, trained)


def test_random_positions_are_those_of_the_callback() -> None:
    model = nn.Sequential(nn.Linear(40, 20), nn.Linear(20, 8), nn.Linear(8, 4))
    select, method = Select(dense=["1"]), mt.sparsity.SET(0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    positions = random_positions(model, method, select, seed=3)
    assert {name: len(one) for name, one in positions.items()} == {"0.weight": 80, "2.weight": 4}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mt.SparseTraining(method, layers=select, seed=3).convert(model)
    for name, weight in mt.sparsity.sparse_weights(model).items():
        assert torch.equal(weight.positions(), positions[name].sort().values)
    other = random_positions(nn.Sequential(nn.Linear(40, 20)), method, seed=4)
    assert not torch.equal(other["0.weight"].sort().values, positions["0.weight"].sort().values)


def test_positions_of_no_layer_are_drawn_with_a_warning() -> None:
    with pytest.warns(mt.core.NoEffectWarning, match=r"`random_positions` has no effect: SET\(.* matched no"):
        assert random_positions(nn.Sequential(nn.ReLU()), mt.sparsity.SET(0.9)) == {}
