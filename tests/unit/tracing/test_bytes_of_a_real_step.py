"""A step without data holds to the byte what a real one holds, whatever the user's code looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.tracing.step.fake_step import FakeStep

ROWS, STEPS, WIDTH = 4, 6, 16
CLASS_WEIGHTS = torch.linspace(0.5, 1.5, WIDTH)
SCALE = {"of": [nn.Parameter(torch.ones(WIDTH))]}


class Recurrent(nn.Module):
    """Keeps its parameters in a list, too; on a CPU some kinds are one operator a layer, others are many."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0].square().mean()


class Weighted(nn.Module):
    """Tensors in a plain attribute, a list, a global and a closure; a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.priors = torch.rand(WIDTH)
        self.more = [torch.rand(WIDTH), (nn.Parameter(torch.rand(WIDTH)),)]
        shift = nn.Parameter(torch.zeros(WIDTH))
        self.shifted = lambda x: x + shift

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x).tanh()) * self.priors * self.more[0] + self.more[1][0]
        x = self.shifted(x) * SCALE["of"][0]
        return F.cross_entropy(x.flatten(0, 1), x.detach().argmax(-1).flatten(), weight=CLASS_WEIGHTS)


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).relu()).square().mean()


class Transformer(nn.Module):
    """Torch's own, which asks whether its mask is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.net(x, x, tgt_mask=mask).square().mean()


class Filled(nn.Module):
    """Writes to a tensor of its own, and to a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("queue", torch.zeros(ROWS, STEPS, WIDTH))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for step in range(x.size(1)):
            out[:, step] = self.layer(x[:, step])
        place = int(self.place)
        self.queue[:, place] = out[:, 0].detach()
        self.place[0] = (place + 1) % STEPS
        return (out - self.queue.clone()).square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "LSTM, both ways": lambda: Recurrent(nn.LSTM, bidirectional=True, dropout=0.1),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "weighted": Weighted,
    "tied": Tied,
    "transformer": Transformer,
    "filled": Filled,
}


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> MemoryLedger:
    """The second of two real steps: by then the optimizer has its state."""
    for _ in range(2):
        optimizer.zero_grad()
        with MemoryLedger(model, optimizer, x) as ledger:
            model(x).backward()
            optimizer.step()
    optimizer.zero_grad()
    return ledger


@pytest.mark.parametrize("name", MODELS)
def test_bytes_by_category_at_the_peak(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(ROWS, STEPS, WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    real = by_hand(model, optimizer, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fake = FakeStep(model, model, (x,), [optimizer])
    for _ in range(2):
        with fake.watched() as ledger:
            fake.run()
        assert ledger.breakdown().maxima == real.breakdown().maxima
        assert ledger.breakdown().peak_bytes == real.breakdown().peak_bytes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("has_opaque_state", [False, True])
def test_optimizers_step_with_and_without_state(name: str, has_opaque_state: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)), torch.randn(ROWS, WIDTH)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    other = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
    real = by_hand(nn.Sequential(other, Mean()), OPTIMIZERS[name](other.parameters()), x)
    optimizer = OPTIMIZERS[name](model.parameters())
    if has_opaque_state:
        loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    fake = FakeStep(model, loss, (x,), [optimizer])
    assert not fake.uncounted
    with fake.watched() as ledger:
        fake.run()
    assert ledger.breakdown().peak_bytes == real.breakdown().peak_bytes
    assert str(optimizer.state_dict()) == str(state)


class Mean(nn.Module):
    """A loss."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()
