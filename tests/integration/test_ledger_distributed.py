"""What two gloo processes hold to exchange gradients, as the ledger and the limits count it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.utils.data import DataLoader

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler, OptimizerInBackward
from lightning_memtrain.checkpointing import MemoryBudget
from lightning_memtrain.ledger import MemoryLedger
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow

WIDTH, NUM_LAYERS, NUM_SAMPLES = 64, 8, 512
MODEL_BYTES = NUM_LAYERS * 4 * (WIDTH * WIDTH + WIDTH)
ACTIVATION_BYTES = 4 * NUM_SAMPLES * WIDTH
LAYER_BYTES = MODEL_BYTES // NUM_LAYERS
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "communication hook": {"ddp_comm_hook": bf16_compress_hook},
    "optimizer in backward": {},
}

OTHERS = ["budget", "budget, bucket views", "without trainer"]


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_LAYERS))
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, foreach=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(6 * NUM_SAMPLES, WIDTH), batch_size=NUM_SAMPLES, shuffle=False)


def _fit(folder: Path, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    profiler = MemoryProfiler(report_dir=None, every_n_steps=1)
    strategy = DDPStrategy(**options)
    trainer = quiet_trainer(folder, *callbacks, profiler, strategy=strategy, devices=2)
    trainer.fit(Net())
    assert profiler.report is not None
    breakdown = profiler.report.stages["fit"]
    return {
        "maxima": breakdown.maxima.to_dict(),
        "at_start": breakdown.timeline[0].held.to_dict(),
        "peaks": [step.peak_bytes for step in profiler.report.steps],
        "ledger_peak": breakdown.ledger_peak_bytes,
    }


def _check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    if name.startswith("budget"):
        options = FORMS["bucket views" if "views" in name else "plain"]
        plain = _fit(folder, **options)["ledger_peak"]
        limit = plain - 3 * ACTIVATION_BYTES
        budget = ActivationCheckpointing(MemoryBudget(limit))
        held = _fit(folder, budget, **options)
        return {"plain": plain, "limit": limit, **held, "says": budget.technique_record().events}
    if name == "without trainer":
        return _steps_without_trainer()
    callbacks = [OptimizerInBackward()] if name == "optimizer in backward" else []
    return _fit(folder, *callbacks, **FORMS[name])


def _steps_without_trainer() -> dict[str, Any]:
    net = Net()
    wrapper = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    maxima = []
    for _ in range(3):
        batch = torch.randn(NUM_SAMPLES, WIDTH)
        optimizer.zero_grad()
        net.forward = net.net.forward  # type: ignore[method-assign]
        with MemoryLedger(net, optimizer, batch) as ledger:
            wrapper(batch).square().mean().backward()
            optimizer.step()
        maxima.append(ledger.breakdown().maxima.to_dict())
    return {"maxima": maxima}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[Any]]]:
    """What each rank found, by case."""
    with TwoRanks(_check, tmp_path_factory.mktemp("two")) as ranks:

        def of(name: str) -> list[Any]:
            for result in ranks(name):
                assert isinstance(result, dict), result
            return ranks(name)

        yield of


@pytest.mark.parametrize("name", FORMS)
def test_buckets_have_a_row_in_every_form(name: str, found: Callable[[str], list[Any]]) -> None:
    for result in found(name):
        assert result["maxima"]["buckets"] == result["at_start"]["buckets"]
        # Beside the buckets, in some forms DDP exchanges which parameters were used.
        assert 0 <= result["maxima"]["buckets"] - MODEL_BYTES <= 2 * 4 * 2 * NUM_LAYERS
        assert result["at_start"]["temporary"] <= 4  # at most the loss of the step before
        assert result["maxima"]["temporary"] <= 4 * ACTIVATION_BYTES + 64
        gradient_bytes = result["maxima"]["gradients"]
        if name == "optimizer in backward":
            # A thread of gloo's may let go of what it has reduced when the next gradient is there already.
            assert LAYER_BYTES <= gradient_bytes < 2 * LAYER_BYTES
        else:
            assert gradient_bytes == (LAYER_BYTES if name == "bucket views" else MODEL_BYTES)
        assert result["maxima"]["parameters"] == MODEL_BYTES


def test_a_ledger_that_is_given_no_trainer_finds_the_buckets_in_forward(
    found: Callable[[str], list[Any]],
) -> None:
    for result in found("without trainer"):
        for maxima in result["maxima"]:
            assert maxima["buckets"] == maxima["gradients"] == MODEL_BYTES


@pytest.mark.parametrize("name", ["budget", "budget, bucket views"])
def test_a_budget_counts_the_buckets(name: str, found: Callable[[str], list[Any]]) -> None:
    for result in found(name):
        assert result["plain"] > result["limit"] >= result["ledger_peak"]
        assert len(result["peaks"]) == 3
        assert max(result["peaks"]) <= result["limit"]
        assert "recomputed: peak" in result["says"][0]
