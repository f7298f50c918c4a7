"""Under ddp all ranks follow one plan, made by the rank with the largest batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.planning.fit import make_plan
from lightning_memtrain.planning.fit.running import fit_memory
from lightning_memtrain.tracing.device import Device
from tests.helpers.stand_in_search import BYTES_PER_NUMBER, StandInSearch
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import TwoRanks

FEATURES = 16
# Parameters, gradients and state of the stand-in, and buckets.
WEIGHTS = (3 + 1) * (FEATURES * 3 + 3) * 4


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(len(batch))
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sharded(Net):
    """Sharded by FSDP2."""

    def configure_model(self) -> None:
        if not isinstance(self.layer.weight, DTensor):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


def check_sharded(with_plan: bool, folder: Path, rank: int) -> dict[str, Any]:
    """FSDP2 on the CPU, by a plan that was made before; one rank has a larger batch at last."""
    plan = None
    if with_plan:
        make_plan.find_ways = StandInSearch()  # type: ignore[assignment]
        plan = mt.plan(Sharded(), torch.ones(8, FEATURES), limit=WEIGHTS + 4 * FEATURES * BYTES_PER_NUMBER)
    callback = mt.FitMemory(None if with_plan else "1GiB", plan=plan)
    data = DataLoader([torch.ones(size, FEATURES) for size in (8, 8, 8 + rank)], batch_size=None)  # type: ignore[arg-type]
    model, said = Sharded(), ""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options = {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    try:
        quiet_trainer(folder, callback, devices=2, strategy=strategy, **options).fit(model, data)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"seen": model.seen, "said": said, "events": callback.technique_record().events}


WIDTH, SAMPLES = 256, 512
LIMIT = 45 * 2**20  # a MiB or more below what it needs as it is
GPU = Device("a small one", 2**30, compute_capability=(8, 0))
FOUND = "plan of a search.yaml"


class Deep(pl.LightningModule):
    """Four blocks, each sharded by FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4))
        self.blocks = nn.Sequential(*blocks)
        self.seen: list[int] = []

    def configure_model(self) -> None:
        for block in self.blocks:
            if not isinstance(block[0].weight, DTensor):
                fully_shard(block, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(len(batch))
        return self.blocks(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def options_of_two() -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "num_sanity_val_steps": 0}


def check_searched(folder: Path) -> dict[str, Any]:
    """Two ranks follow the file of a plan that was searched for before they began."""
    callback = mt.FitMemory(plan=folder / FOUND)
    model = Deep()
    data = DataLoader([torch.ones(SAMPLES, WIDTH)] * 2, batch_size=None)  # type: ignore[arg-type]
    quiet_trainer(folder, callback, **options_of_two()).fit(model, data)
    shard = sum(one.to_local().numel() for one in model.parameters() if isinstance(one, DTensor))
    return {"seen": model.seen, "shard": shard, "events": callback.technique_record().events}


def check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    if name == "searched":
        return check_searched(folder)
    if name.startswith("sharded"):
        return check_sharded(name == "sharded", folder, rank)
    search = StandInSearch()
    fit_memory.find_ways = search  # type: ignore[assignment]  # a process of its own
    samples = 1 / 2 if name == "refused" else 4
    callback = mt.FitMemory(WEIGHTS + int(samples * FEATURES * BYTES_PER_NUMBER))
    # The second rank has the larger batches, and a larger one still in the third step.
    sizes = [(4, 4, 4), (8, 8, 16)][rank]
    data = DataLoader([torch.ones(size, FEATURES) for size in sizes], batch_size=None)  # type: ignore[arg-type]
    model = Net()
    trainer = quiet_trainer(
        folder, callback, devices=2, strategy="ddp", use_distributed_sampler=False, num_sanity_val_steps=0
    )
    said = ""
    try:
        trainer.fit(model, data)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {
        "seen": model.seen,
        "calls": len(search.calls),
        "events": callback.technique_record().events,
        "said": said,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with TwoRanks(check, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def test_all_ranks_follow_the_plan_of_the_largest(found: TwoRanks) -> None:
    small, large = found("kept")
    assert large["calls"] == 2  # the first batch, and the larger one
    assert small["calls"] == 0
    assert small["events"] == large["events"]
    assert "a tensor of the batch is [16, 16], not [8, 16]" in large["events"][1]
    assert small["seen"] == [4, 4, 4]
    assert large["seen"] == [4] * 8


def test_all_ranks_are_refused_together(found: TwoRanks) -> None:
    small, large = found("refused")
    assert small["said"] == large["said"]
    assert small["said"].startswith(
        "MisconfigurationException: `FitMemory(limit)` of 1.58 KiB cannot be kept."
    )
    assert small["seen"] == large["seen"] == []


def test_under_fsdp2_all_ranks_follow_the_plan_that_was_made_before(found: TwoRanks) -> None:
    ranks = found("sharded")
    assert [rank["seen"] for rank in ranks] == [[4, 4, 4, 4]] * 2
    assert ranks[0]["events"] == ranks[1]["events"]
    # The third batch is larger on one of them; both end.
    for rank in ranks:
        assert rank["said"].startswith(
            "MisconfigurationException: `FitMemory(plan)` was made for less than step 2 needs on some rank"
        )
    assert "a tensor of the batch is [9, 16], not [8, 16]" in ranks[1]["said"]


def test_under_fsdp2_a_plan_within_the_run_is_refused(found: TwoRanks) -> None:
    for rank in found("sharded, no plan"):
        assert rank["seen"] == []
        assert "FSDP2 shards the model before it begins" in rank["said"]


def test_a_search_for_fsdp2_leads_to_a_plan_that_two_ranks_follow(found: TwoRanks, tmp_path: Path) -> None:
    batch = torch.ones(SAMPLES, WIDTH)
    trainer = quiet_trainer(tmp_path, **options_of_two())
    limit = GPU.context_bytes + LIMIT
    plan = mt.plan(Deep(), batch, limit=limit, device=GPU, trainer=trainer)
    assert plan.fits
    assert plan.chosen.exact
    assert plan.chosen.reserved_bytes <= limit - GPU.context_bytes
    assert plan.plain.reserved_bytes is not None
    assert plan.plain.reserved_bytes > LIMIT
    plan.save(found.folder / FOUND)
    ranks = found("searched")
    assert ranks[0]["events"] == ranks[1]["events"]
    assert [rank["shard"] for rank in ranks] == [4 * (WIDTH + 1) * WIDTH // 2] * 2
    size = next(
        (
            one.init_args["microbatch_size"]
            for one in plan.chosen.techniques
            if "microbatch_size" in one.init_args
        ),
        SAMPLES,
    )
    assert [set(rank["seen"]) for rank in ranks] == [{size}] * 2
