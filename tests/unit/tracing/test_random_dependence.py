"""A step whose course depends on random numbers is told from others, and sized by its fullest draw."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.tracing.step.fake_step import FakeStep

ROWS, WIDTH = 16, 8


class LayerDrop(nn.Module):
    """Leaves out layers at random."""

    def __init__(self, draw: Callable[[], float], rate: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4)
        )
        self.draw, self.rate = draw, rate

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.draw() < self.rate:
                x = layer(x)
        return x.square().mean()


def drawn_by_torch() -> Tensor:
    return torch.rand([])


DRAWS = {"torch": drawn_by_torch, "python": random.random, "numpy": numpy.random.rand}


@pytest.mark.parametrize("name", DRAWS)
def test_the_fullest_step_is_that_with_all_layers(name: str) -> None:
    torch.manual_seed(0)
    model, x = LayerDrop(DRAWS[name], 0.5), torch.randn(ROWS, WIDTH)
    with MemoryLedger(model, inputs=x) as real:
        model.rate = 0.0
        model(x).backward()
    model.rate = 0.5
    model.zero_grad()
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes()
    fake = FakeStep(model, model, (x,))
    fake.prepare(nullcontext)
    assert fake.depends_on_random_numbers
    fake.use_fullest_draw(64)
    with fake.watched() as ledger:
        fake.run()
    assert ledger.breakdown().peak_bytes == real.breakdown().peak_bytes
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == state[1:]


def test_dropout_and_noise_are_no_chance() -> None:
    model, x = LayerDrop(lambda: 1.0, 0.0), torch.randn(ROWS, WIDTH)
    fake = FakeStep(model, lambda x: model(x + 0.1 * torch.randn(ROWS, WIDTH)), (x,))
    fake.prepare(nullcontext)
    assert not fake.depends_on_random_numbers
