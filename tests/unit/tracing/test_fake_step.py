"""A step on fake tensors leaves nothing behind: attributes, what they contain, and random numbers."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lightning_memtrain.tracing.step.fake_step import FakeStep

WIDTH = 4


@dataclass
class _Progress:
    num_rows: int = 0


class _Notes(nn.Module):
    """Writes down what happens, in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.num_calls = self._num_calls = 0
        self.last: Tensor | None = None
        self.list: list[Any] = []
        self.dict: dict[str, int] = {"calls": 0}
        self.set: set[int] = set()
        self.counter: Counter[str] = Counter(calls=2)
        self.deque: deque[int] = deque([7, 8], maxlen=2)
        self.progress = _Progress()

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        self._num_calls += 1
        x = self.last = self.layer(x) / self.num_calls
        self.list.append(x)
        self.dict["calls"] += 1
        self.set.add(self.num_calls)
        self.counter["calls"] += 1
        self.deque.append(self.num_calls)
        self.progress.num_rows += len(x)
        self.new = True
        return x


def _run(model: nn.Module) -> None:
    batch = torch.ones(3, WIDTH)
    fake = FakeStep(model, lambda x: model(x).sum(), (batch,), [torch.optim.SGD(model.parameters())])
    with fake.watched():
        fake.run()


def test_attributes_of_modules_within_are_as_before() -> None:
    model = nn.Sequential(nn.Sequential(_Notes()), nn.Tanh())
    notes = model[0][0]
    names, containers = set(vars(notes)), [notes.list, notes.dict, notes.set, notes.counter, notes.deque]
    progress = notes.progress
    _run(model)
    assert set(vars(notes)) == names
    assert (notes.num_calls, notes._num_calls, notes.last) == (0, 0, None)
    now = [notes.list, notes.dict, notes.set, notes.counter, notes.deque]
    assert all(one is other for one, other in zip(containers, now, strict=True))  # others may hold them, too
    assert now == [[], {"calls": 0}, set(), Counter(calls=2), deque([7, 8])]
    assert notes.progress is progress
    assert progress.num_rows == 0


class _Noisy(torch.optim.SGD):
    """Draws random numbers when it steps."""

    def step(self, closure: Any = None) -> Any:
        _draw()
        return super().step(closure)


def _draw() -> tuple[float, float, Tensor]:
    return random.random(), numpy.random.rand(), torch.rand(())


def test_random_numbers_go_on_as_without() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    batch = torch.ones(3, WIDTH)

    def loss(x: Tensor) -> Tensor:
        return (model(x) * random.random() * numpy.random.rand() * torch.rand(())).sum()

    draws = []
    for rehearses in (False, True):
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)
        if rehearses:
            fake = FakeStep(model, loss, (batch,), [_Noisy(model.parameters())])
            with fake.watched():
                fake.run()
        draws.append(_draw())
    assert draws[0] == draws[1]
