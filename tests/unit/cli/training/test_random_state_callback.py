"""Random numbers of a resumed run."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch

from lightning_memtrain.cli.training.random_state_callback import RandomState

TRAINER = SimpleNamespace(world_size=1, global_rank=0)


def draw() -> tuple[float, float]:
    return random.random(), torch.rand(1).item()


def test_numbers_go_on_where_they_were_saved(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(RandomState().state_dict(), path)
    numbers = draw()
    resumed = RandomState()
    resumed.load_state_dict(torch.load(path, weights_only=True))
    draw()
    resumed.on_train_start(TRAINER, None)
    assert draw() == numbers
    # The first batch is not the first of its epoch: its loader has drawn a seed since.
    resumed.on_train_batch_start(TRAINER, None, None, batch_idx=3)
    assert draw() == numbers
    resumed.on_train_batch_start(TRAINER, None, None, batch_idx=4)
    assert draw() != numbers


def test_another_number_of_processes_keeps_its_numbers():
    saved = RandomState()
    state = saved.state_dict()
    numbers = draw()
    resumed = RandomState()
    resumed.load_state_dict(state)
    resumed.on_train_start(SimpleNamespace(world_size=2, global_rank=0), None)
    assert draw() != numbers
