"""Whatever a batch is made of, and whatever a step does with it, is predicted for a GPU and for a CPU."""

from __future__ import annotations

import dataclasses
from collections import UserDict, deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.planning import predict

PICTURES, LABELS = torch.ones(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])


@dataclasses.dataclass
class Record:
    """A field that a batch has, one that it may have, and one that is no tensor."""

    pictures: Tensor
    labels: Tensor
    mask: Tensor | None = None
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"] * 6)


class Pair(NamedTuple):
    """With names in the place of positions."""

    pictures: Tensor
    labels: Tensor


class Slotted:
    """An object without a dictionary, that knows how it is moved."""

    __slots__ = ("labels", "pictures")

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self.pictures, self.labels = pictures, labels

    def to(self, *args: Any, **kwargs: Any) -> Slotted:
        return Slotted(self.pictures.to(*args, **kwargs), self.labels.to(*args, **kwargs))


BATCHES: dict[str, Any] = {
    "tuple": (PICTURES, LABELS),
    "dictionary with text": {"pictures": PICTURES, "labels": LABELS, "id": ["x"] * 6, "epoch": 3},
    "dictionary's look-alike": UserDict(pictures=PICTURES, labels=LABELS),
    "dataclass": Record(PICTURES, LABELS),
    "named tuple": Pair(PICTURES, LABELS),
    "object with slots": Slotted(PICTURES, LABELS),
    "nested": {"inner": [Pair(PICTURES, LABELS), None, ("text", 1.5)]},
}


class Net(pl.LightningModule):
    """Draws from distributions, counts in attributes, asks for lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(8, 8), nn.Linear(4, 3)
        self.seen: deque[Any] = deque(maxlen=2)
        self.counts = {"steps": 0}

    def training_step(self, batch: Any, index: int) -> Tensor:
        pictures, labels = taken(batch)
        self.counts["steps"] += 1
        mean, scale = self.encoder(pictures).chunk(2, -1)
        normal = torch.distributions.Normal(mean, nn.functional.softplus(scale) + 1e-3)
        drawn = normal.rsample()
        chosen = torch.distributions.Categorical(logits=self.head(drawn))
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(scale))
        self.seen.append(drawn.detach())
        assert int(labels.max().item()) == 2
        divergence = torch.distributions.kl_divergence(normal, prior).mean()
        return divergence - chosen.log_prob(labels).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def taken(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict) and "inner" in batch:
        batch = batch["inner"][0]
    if isinstance(batch, (dict, UserDict)):
        return batch["pictures"], batch["labels"]
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1]
    return batch.pictures, batch.labels


@pytest.fixture(scope="module")
def plain_bytes() -> dict[str, int]:
    """What a batch of two tensors takes, by device."""
    return {
        device: predict(Net(), (PICTURES, LABELS), device=device).allocated_bytes for device in ("T4", "cpu")
    }


@pytest.mark.parametrize("device", ["T4", "cpu"])
@pytest.mark.parametrize("name", BATCHES)
def test_any_batch_is_predicted(name: str, device: str, plain_bytes: dict[str, int]) -> None:
    model = Net()
    assert predict(model, BATCHES[name], device=device).allocated_bytes == plain_bytes[device]
    assert model.counts == {"steps": 0}
    assert not model.seen


@pytest.mark.parametrize("name", BATCHES)
def test_a_tensor_elsewhere_is_refused_in_any_batch(name: str) -> None:
    batch = {"pictures": PICTURES.to("meta"), "rest": BATCHES[name]}
    with pytest.raises(ValueError, match=r"`predict\(batch\)` must be on the CPU, .* has a tensor on meta"):
        predict(Net(), batch, device="T4")
