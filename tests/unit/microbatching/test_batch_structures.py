"""Batches of any structure through a real trainer: the run equals that of unsplit batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import BatchEncoding, BertConfig, BertForMaskedLM

from lightning_memtrain.microbatching import Microbatching
from tests.helpers.twin_runs import assert_same_run, train

IGNORED = -100


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclass
class Sample:
    inputs: Tensor
    targets: Tensor
    names: list[str]
    scale: float = 2.0


class Net(LightningModule):
    """Reads its batch by a function, so that one model serves all structures."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.read = read

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        inputs, targets = self.read(batch)
        outputs = self.net(inputs)
        loss = F.mse_loss(outputs, targets)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(targets))
        return {"loss": loss, "outputs": outputs.detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def samples(index: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return tuple(torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (3, 2))


def read_sample(batch: Sample) -> tuple[Tensor, Tensor]:
    assert len(batch.names) == len(batch.inputs)
    assert [int(name) for name in batch.names] == batch.inputs[:, 0].mul(100).int().tolist()
    return batch.inputs * batch.scale, batch.targets


def make_sample(x: Tensor, y: Tensor) -> Sample:
    return Sample(x, y, [str(int(100 * row)) for row in x[:, 0]])


Structure = tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]
STRUCTURES: dict[str, Structure] = {
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
    "dataclass": (make_sample, read_sample),
    "namedtuple": (Pair, lambda batch: (batch.inputs, batch.targets)),
    "nested": (
        lambda x, y: {"views": [(x, {"again": x})], "rest": Pair(x, y)},
        lambda batch: (batch["views"][0][1]["again"] + batch["views"][0][0], batch["rest"].targets),
    ),
    "other items": (
        lambda x, y: (x, y, 3, "train", None, torch.tensor(0.5)),
        lambda batch: (batch[0] * batch[2] * batch[5], batch[1]),
    ),
}


@pytest.mark.parametrize("split", [{"num_microbatches": 3}, {"microbatch_size": "auto", "limit": "1GiB"}])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_a_run_equals_that_of_whole_batches(structure: Structure, split: dict[str, Any], tmp_path: Path):
    make, read = structure
    batches = [make(*samples(index, size)) for index, size in enumerate((10, 10, 4))]
    plain = train(lambda: Net(read), batches, tmp_path)
    assert_same_run(plain, train(lambda: Net(read), batches, tmp_path, Microbatching(**split)))


# ---------------------------------------------------------------------- Hugging Face


class Bert(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertForMaskedLM(config).double()

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> Tensor:
        assert isinstance(batch, BatchEncoding)
        loss = self.bert(**batch).loss  # a mean over the labels that are not ignored
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def count_labels(batch: BatchEncoding) -> Tensor:
    return (batch["labels"] != IGNORED).sum()


def token_batches(num: int = 2) -> list[BatchEncoding]:
    generator = torch.Generator().manual_seed(6)
    batches = []
    for _ in range(num):
        tokens = torch.randint(30, (7, 12), generator=generator)
        masked = torch.rand(7, 12, generator=generator) < 0.3
        masked[:3] = False  # the first of three chunks has no label at all
        lengths = torch.randint(6, 13, (7, 1), generator=generator)
        data = {
            "input_ids": tokens.masked_fill(masked, 1),
            "attention_mask": (torch.arange(12) < lengths).long(),
            "labels": tokens.masked_fill(~masked, IGNORED),
        }
        batches.append(BatchEncoding(data))
    return batches


def test_a_language_model_is_weighted_by_its_labels(tmp_path: Path):
    plain = train(Bert, token_batches(), tmp_path, max_epochs=1)
    split = Microbatching(num_microbatches=3, weight_fn=count_labels)
    chunked = train(Bert, token_batches(), tmp_path, split, max_epochs=1)
    assert len(plain.observed.gradients) == 2
    assert all(step["loss_step"].isfinite() for step in chunked.observed.on_step)
    assert_same_run(plain, chunked)


# ---------------------------------------------------------------------- split_fn


class TimeFirst(LightningModule):
    """Sequences of shape (time, sample, feature), with lengths per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4).double()
        self.head = nn.Linear(4, 1).double()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        sequences, targets = batch
        _, last = self.rnn(sequences)
        loss = F.mse_loss(self.head(last[0])[:, 0], targets)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(targets))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def split_second_axis(batch: tuple[Tensor, Tensor], num_microbatches: int) -> list[tuple[Tensor, Tensor]]:
    sequences, targets = batch
    num = min(num_microbatches, len(targets))
    return list(zip(sequences.tensor_split(num, dim=1), targets.tensor_split(num), strict=True))


def test_time_first_is_split_by_split_fn(tmp_path: Path):
    generator = torch.Generator().manual_seed(7)
    batches = [
        (
            torch.randn(6, size, 3, generator=generator, dtype=torch.float64),
            torch.randn(size, generator=generator, dtype=torch.float64),
        )
        for size in (7, 6, 4)  # in the second one, time and samples are equally many
    ]
    split = Microbatching(
        num_microbatches=3, split_fn=split_second_axis, weight_fn=lambda chunk: len(chunk[1])
    )
    plain = train(TimeFirst, batches, tmp_path)
    chunked = train(TimeFirst, batches, tmp_path, split)
    assert_same_run(plain, chunked)
