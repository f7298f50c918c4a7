"""A limit of automatic microbatches in two gloo processes, whose batches differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.core import OutOfReach
from lightning_memtrain.microbatching import Microbatching
from tests.helpers.trainers import LedgerPeaks, quiet_trainer
from tests.helpers.two_ranks import found_by_two_ranks

pytestmark = pytest.mark.slow

WIDTH = 64


class OthersLimit(OutOfReach, RuntimeError):
    """A limit of another technique's, which a smaller chunk might keep."""


class Net(LightningModule):
    def __init__(self, samples: list[tuple[int, int]], refuses: bool = False) -> None:
        super().__init__()
        self.refuses = refuses
        self.samples = samples
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.refuses and batch_idx == 1 and self.global_rank == 1:
            raise OthersLimit("too much for another technique")
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.global_rank)
        sizes = [sizes[self.global_rank] for sizes in self.samples]
        return DataLoader([torch.randn(size, WIDTH, generator=generator) for size in sizes], batch_size=None)


MODEL_BYTES = 4 * 4 * (WIDTH * WIDTH + WIDTH)
SAMPLE_BYTES = 4 * WIDTH
# Weights, gradients, what DDP averages them in, Adam's state and its temporary tensors of one layer; batches
# and chunks beside.
LIMIT = 5 * MODEL_BYTES + 2 * MODEL_BYTES // 4 + 300 * SAMPLE_BYTES
CASES: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
    "alike": ([(256, 256)] * 4, {}),
    "bucket views": ([(256, 256)] * 4, {"gradient_as_bucket_view": True}),
    "one is small at first": ([(2, 200), (200, 2), (200, 200)], {}),
    "one cannot": ([(16, 400)] * 2, {}),
    "another's limit": ([(64, 64)] * 2, {}),
}


def _check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    samples, options = CASES[name]
    peaks, microbatching = LedgerPeaks(), Microbatching(microbatch_size="auto", limit=LIMIT)
    sizes: list[int | None] = []

    class Sizes(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            sizes.append(microbatching.microbatch_size)

    torch.manual_seed(0)
    net = Net(samples, refuses=name == "another's limit")
    options = {"strategy": DDPStrategy(**options), "devices": 2, "use_distributed_sampler": False}
    trainer = quiet_trainer(folder, microbatching, peaks, Sizes(), **options)
    error = ""
    try:
        trainer.fit(net)
    except (MisconfigurationException, OthersLimit) as refusal:
        error = str(refusal)
    return {"peaks": peaks.peaks, "sizes": sizes, "error": error}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    return found_by_two_ranks(_check, [*CASES], tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("name", ["alike", "bucket views", "one is small at first"])
def test_every_rank_keeps_the_limit_with_what_ddp_holds(name: str, found: list[dict[str, Any]]) -> None:
    for result in found:
        assert isinstance(result[name], dict), result[name]
        assert result[name]["error"] == ""
        assert len(result[name]["peaks"]) == len(CASES[name][0])
        assert max(result[name]["peaks"]) <= LIMIT
        assert all(size > 1 for size in result[name]["sizes"])
    if name != "one is small at first":
        assert found[0][name]["sizes"] == found[1][name]["sizes"]


def test_a_rank_with_a_small_batch_does_not_hold_the_others_back(found: list[dict[str, Any]]) -> None:
    first, second = (result["one is small at first"]["sizes"] for result in found)
    assert first[0] == 2
    assert second[0] == first[1] == first[2] == second[2] > 2


def test_a_limit_that_one_rank_cannot_keep_is_refused_on_all(found: list[dict[str, Any]]) -> None:
    able, unable = (result["one cannot"] for result in found)
    assert able["error"] == (
        "`Microbatching(limit)` must have room for one sample at a time on every rank, but got a limit that "
        "another rank cannot keep; its error says what it needs. Raise the limit."
    )
    assert unable["error"].startswith("`Microbatching(limit)` must have room for ")
    assert "of the batch and other inputs" in unable["error"]
    assert able["peaks"] == unable["peaks"] == []


def test_a_limit_of_another_technique_that_one_rank_cannot_keep_ends_all(found: list[dict[str, Any]]) -> None:
    able, unable = (result["another's limit"] for result in found)
    assert unable["error"] == "too much for another technique"
    assert able["error"] == (
        '`Microbatching(microbatch_size="auto")` must find a size with which every rank keeps the limits of '
        "other techniques, but another rank cannot keep one with a single sample at a time; its error says "
        "which and what it needs. Raise that limit."
    )
    assert len(able["sizes"]) == len(unable["sizes"]) == 1
