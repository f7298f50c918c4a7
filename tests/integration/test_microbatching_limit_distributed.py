"""A limit of automatic microbatches in two gloo processes, whose batches differ."""

from __future__ import annotations

from collections.abc import Iterator
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
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow

WIDTH = 64


class OthersLimit(OutOfReach, RuntimeError):
    """A limit of another technique's, which a smaller chunk might keep."""


class Unforeseeable(torch.optim.SGD):
    """Asks for numbers, which a stand-in does not have; makes a copy of all gradients, and more on rank 1."""

    evaluates_twice = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        copies = [gradient.clone() for gradient in gradients]
        assert all(copy.numpy().size for copy in copies)
        if torch.distributed.get_rank() == 1:
            copies += [gradient.clone() for gradient in 40 * gradients]
        del copies
        if self.evaluates_twice:
            closure()
        super().step()
        return loss


class EvaluatesTwice(Unforeseeable):
    """The other rank is amid its second evaluation of the model when rank 1 is broken off."""

    evaluates_twice = True


class Net(LightningModule):
    def __init__(
        self, samples: list[tuple[int, int]], refuses: bool = False, optimizer: Any = torch.optim.Adam
    ) -> None:
        super().__init__()
        self.refuses = refuses
        self.optimizer = optimizer
        self.samples = samples
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.refuses and batch_idx == 1 and self.global_rank == 1:
            raise OthersLimit("too much for another technique")
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.001)

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
    "step": ([(64, 64)] * 2, {}),
    "step that evaluates twice": ([(64, 64)] * 2, {}),
}


def _check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    samples, options = CASES[name]
    peaks, microbatching = LedgerPeaks(), Microbatching(microbatch_size="auto", limit=LIMIT)
    sizes: list[int | None] = []

    class Sizes(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            sizes.append(microbatching.microbatch_size)

    torch.manual_seed(0)
    unforeseeable = {"step": Unforeseeable, "step that evaluates twice": EvaluatesTwice}
    optimizer = unforeseeable.get(name, torch.optim.Adam)
    net = Net(samples, refuses=name == "another's limit", optimizer=optimizer)
    options = {"strategy": DDPStrategy(**options), "devices": 2, "use_distributed_sampler": False}
    trainer = quiet_trainer(folder, microbatching, peaks, Sizes(), **options)
    error = ""
    try:
        trainer.fit(net)
    except (MisconfigurationException, OthersLimit) as refusal:
        error = str(refusal)
    if name.startswith("step"):
        peaks.ledger.__exit__(None, None, None)
        peaks.peaks.append(peaks.ledger.breakdown().ledger_peak_bytes)
    return {"peaks": peaks.peaks, "sizes": sizes, "error": error}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank found, by case."""
    with TwoRanks(_check, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", ["alike", "bucket views", "one is small at first"])
def test_every_rank_keeps_the_limit_with_what_ddp_holds(name: str, found: TwoRanks) -> None:
    first, second = found(name)
    for result in (first, second):
        assert isinstance(result, dict), result
        assert result["error"] == ""
        assert len(result["peaks"]) == len(CASES[name][0])
        assert max(result["peaks"]) <= LIMIT
        assert all(size > 1 for size in result["sizes"])
    if name != "one is small at first":
        assert first["sizes"] == second["sizes"]


def test_a_rank_with_a_small_batch_does_not_hold_the_others_back(found: TwoRanks) -> None:
    first, second = (result["sizes"] for result in found("one is small at first"))
    assert first[0] == 2
    assert second[0] == first[1] == first[2] == second[2] > 2


def test_a_limit_that_one_rank_cannot_keep_is_refused_on_all(found: TwoRanks) -> None:
    able, unable = found("one cannot")
    assert able["error"] == unable["error"]
    assert unable["error"].startswith("On rank 1: `Microbatching(limit)` must have room for ")
    assert "of the batch and other inputs" in unable["error"]
    assert able["peaks"] == unable["peaks"] == []


@pytest.mark.parametrize("name", ["step", "step that evaluates twice"])
def test_a_step_that_one_rank_cannot_take_within_the_limit_is_refused_on_all(
    name: str, found: TwoRanks
) -> None:
    """Nothing could foretell it, so it is refused amid the first step, before any rank has ended it."""
    able, unable = found(name)
    assert able["error"] == unable["error"]
    assert unable["error"].startswith(
        "On rank 1: `Microbatching(limit)` must have room for the step of the optimizer, which takes at "
    )
    assert able["sizes"] == unable["sizes"] == []
    assert max(*able["peaks"], *unable["peaks"]) <= LIMIT


def test_a_limit_of_another_technique_that_one_rank_cannot_keep_ends_all(found: TwoRanks) -> None:
    able, unable = found("another's limit")
    assert unable["error"] == "too much for another technique"
    assert able["error"] == (
        '`Microbatching(microbatch_size="auto")` must find a size with which every rank keeps the limits of '
        "other techniques, but another rank cannot keep one with a single sample at a time; its error says "
        "which and what it needs. Raise that limit."
    )
    assert len(able["sizes"]) == len(unable["sizes"]) == 1
