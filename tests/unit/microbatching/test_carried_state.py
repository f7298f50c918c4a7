"""Models that go on with what the call of ``training_step`` before has left."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.carried_state import CarriedState
from lightning_memtrain.microbatching.splitting.chunks import Chunk
from tests.helpers.twin_runs import assert_same_run, train

WIDTH = 5


@dataclass
class State:
    hidden: Any = None


class Recurrent(LightningModule):
    """Goes on with the hidden state of each sample in the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)
        self.double()
        self.hidden: Any = None

    def get(self) -> Any:
        return self.hidden

    def put(self, hidden: Any) -> None:
        self.hidden = hidden

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        outputs, hidden = self.rnn(batch, self.get())
        self.put(tuple(tensor.detach() for tensor in hidden))
        return nn.functional.mse_loss(self.out(outputs)[:, :-1], batch[:, 1:])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InObject(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.states = {"rnn": [State()]}

    def get(self) -> Any:
        return self.states["rnn"][0].hidden

    def put(self, hidden: Any) -> None:
        self.states["rnn"][0].hidden = hidden


class InBuffers(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("h", None)
        self.register_buffer("c", None)

    def get(self) -> Any:
        return None if self.h is None else (self.h, self.c)

    def put(self, hidden: Any) -> None:
        self.h, self.c = hidden


class InSubmodule(Recurrent):
    def get(self) -> Any:
        return getattr(self.rnn, "last", None)

    def put(self, hidden: Any) -> None:
        self.rnn.last = hidden


class InPlace(Recurrent):
    """Has room for a whole batch, and uses as much of it as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("room", torch.zeros(2, 1, 8, WIDTH, dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.size = len(batch)
        return super().training_step(batch, batch_idx)

    def get(self) -> Any:
        return tuple(self.room[:, :, : self.size].clone())

    def put(self, hidden: Any) -> None:
        self.room[:, :, : self.size] = torch.stack(hidden)


class StartsAnew(Recurrent):
    """Forgets in the first batch, so that only the second one goes on."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.hidden = None
        return super().training_step(batch, batch_idx)


def sequences(num: int = 3, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 6, 3, generator=generator, dtype=torch.float64) for _ in range(num)]


MODELS: list[tuple[type[Recurrent], str]] = [
    (Recurrent, "Recurrent.hidden[0]"),
    (InObject, "InObject.states['rnn'][0].hidden[0]"),
    (InBuffers, "InBuffers.h"),
    (InSubmodule, "InSubmodule.rnn.last[0]"),
    (InPlace, "InPlace.room"),
    (StartsAnew, "StartsAnew.hidden[0]"),
]
SPLITS: list[dict[str, Any]] = [
    {"num_microbatches": 2},
    {"num_microbatches": 3},  # 3, 3 and 2 samples
    {"microbatch_size": 1},
    {"microbatch_size": "auto", "limit": "1GiB"},
]


@pytest.mark.parametrize("split", SPLITS[:3], ids=["even", "uneven", "one"])
@pytest.mark.parametrize(("model", "place"), MODELS, ids=[model.__name__ for model, _ in MODELS])
def test_a_state_of_samples_is_refused_by_name(
    model: Callable[[], Recurrent], place: str, split: dict[str, Any], tmp_path: Path
):
    with pytest.raises(MisconfigurationException) as refused:
        train(model, sequences(), tmp_path, Microbatching(**split), max_epochs=1)
    message = str(refused.value)
    assert "`training_step` goes on with nothing of the samples of the call before" in message
    assert f"but got {place} of shape (" in message
    assert "Give the state to `training_step` in the batch" in message


def test_a_probe_refuses_it_already(tmp_path: Path):
    with pytest.raises(MisconfigurationException, match=r"but got Recurrent\.hidden\[0\] of shape"):
        train(Recurrent, sequences(), tmp_path, Microbatching(**SPLITS[3]), max_epochs=1)


def test_a_batch_that_is_not_split_may_go_on(tmp_path: Path):
    plain = train(Recurrent, sequences(), tmp_path)
    assert_same_run(plain, train(Recurrent, sequences(), tmp_path, Microbatching(microbatch_size=8)), 0, 0)


class Stateless(Recurrent):
    """Leaves much behind that no later call goes on with, and caches what is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.last = SimpleNamespace(output=None)
        self.recent: deque[Tensor] = deque(maxlen=3)
        self.mask: Tensor | None = None
        self.loss_so_far = torch.zeros(())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.mask is None or self.mask.size(1) < batch.size(1):
            self.mask = torch.ones(1, batch.size(1), 1, dtype=torch.float64)
        if self.last.output is not None:
            assert self.last.output.shape[1:] == (6, WIDTH)
        self.last.output, _ = self.rnn(batch * self.mask)
        outputs = self.out(self.last.output)  # made in this very call
        loss = nn.functional.mse_loss(outputs[:, :-1], batch[:, 1:])
        self.kept.append(outputs.detach())
        self.recent.append(outputs.detach())
        self.loss_so_far = 0.9 * self.loss_so_far + 0.1 * loss.detach()
        return loss


@pytest.mark.parametrize("split", SPLITS, ids=["even", "uneven", "one", "auto"])
def test_what_is_left_behind_and_not_used_is_no_state(split: dict[str, Any], tmp_path: Path):
    plain = train(Stateless, sequences(), tmp_path)
    assert_same_run(plain, train(Stateless, sequences(), tmp_path, Microbatching(**split)))


class Centred(LightningModule):
    """Averages the outputs of all batches, as DINO's centre does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, WIDTH).double()
        self.register_buffer("centre", torch.zeros(1, WIDTH, dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        outputs = self.net(batch[:, 0])
        loss = (outputs - self.centre).square().mean()
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0, keepdim=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_state_of_all_samples_is_told_once(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"microbatch, not once per batch \(Centred.centre, \[1, 5\]\)"):
        train(Centred, sequences(), tmp_path, Microbatching(num_microbatches=2))
    carried = CarriedState(nn.Module())
    carried._warned = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        carried._warn([])


def test_ever_fewer_batches_are_watched():
    carried, watched = CarriedState(nn.Module()), []
    two = [Chunk(None, 0.5, 1), Chunk(None, 0.5, 1)]
    for number in range(1, 40):
        carried.begin(two)
        if carried._watches:
            watched.append(number)
        carried.begin(two[:1])
        assert not carried._watches
    assert watched == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33]


def test_out_of_memory_is_not_mistaken_for_a_state():
    module = nn.Module()
    carried = CarriedState(module)
    chunks = [Chunk(None, 0.5, 2), Chunk(None, 0.5, 2)]
    carried.begin(chunks)
    with carried.watch(chunks[0]):
        module.left = torch.ones(2)

    def fail() -> None:
        with carried.watch(chunks[1]):
            module.left.sum()
            raise torch.OutOfMemoryError("injected")

    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        fail()


class Compiled(Stateless):
    """Compiled without a break, so that more variants than torch allows would be an error."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.compile(self.out, fullgraph=True, backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from within torch
def test_compiled_layers_are_left_to_torch(tmp_path: Path):
    torch._dynamo.reset()
    batches = sequences(num=12)
    plain = train(Compiled, batches, tmp_path, max_epochs=1)
    chunked = train(Compiled, batches, tmp_path, Microbatching(num_microbatches=2), max_epochs=1)
    assert_same_run(plain, chunked)
