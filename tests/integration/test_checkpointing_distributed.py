"""Recomputing activations in two gloo processes equals not doing so, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_memtrain import ActivationCheckpointing, Microbatching
from lightning_memtrain.checkpointing import MemoryBudget
from lightning_memtrain.core import NoEffectWarning
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow

NUM_BATCHES, ROWS, WIDTH = 4, 12, 8


class Net(LightningModule):
    """Blocks with dropout and batch norm, on batches that differ between the ranks."""

    rows = ROWS

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.unused = nn.Linear(4, 4) if type(self) is WithUnused else None

    def block(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for block in self.blocks:
            batch = batch + block(batch)
        loss = batch.square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(self.global_rank)
        batches = [torch.randn(self.rows, WIDTH, generator=generator) for _ in range(NUM_BATCHES)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Long(Net):
    """Batches beside which the states of random numbers, 5 KB each, are small."""

    rows = 1200


class WithUnused(Net):
    """Parameters without a gradient."""


class Sharded(Net):
    """Each block is a shard of its own; made in `configure_model`."""

    def block(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Dropout(0.2))

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in self.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


@dataclass
class Case:
    policy: Any = "full"
    strategy: Callable[[], Any] = DDPStrategy
    model: Callable[[], LightningModule] = Net
    others: Callable[[], list[Any]] = list
    trainer: dict[str, Any] = field(default_factory=dict)


def _fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


CASES = {
    "ddp": Case(),
    "ddp, segments": Case("sqrt"),
    "ddp, nested": Case("nested"),
    "ddp, chosen": Case(MemoryBudget(600_000), model=Long),
    "unused parameters": Case(strategy=lambda: DDPStrategy(find_unused_parameters=True), model=WithUnused),
    "static graph": Case(strategy=lambda: DDPStrategy(static_graph=True)),
    "bucket views, accumulated": Case(
        strategy=lambda: DDPStrategy(gradient_as_bucket_view=True), trainer={"accumulate_grad_batches": 2}
    ),
    "microbatches": Case(others=lambda: [Microbatching(num_microbatches=3)]),
    "microbatches, chosen": Case(
        MemoryBudget(220_000), model=Long, others=lambda: [Microbatching(num_microbatches=3)]
    ),
    "fsdp2": Case(strategy=_fsdp2, model=Sharded),
    "fsdp2, segments": Case("sqrt", strategy=_fsdp2, model=Sharded),
    "fsdp2, microbatches": Case(
        strategy=_fsdp2, model=Sharded, others=lambda: [Microbatching(num_microbatches=2)]
    ),
}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _train(case: Case, folder: Path, *callbacks: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = case.model()
    trainer = quiet_trainer(
        folder, *case.others(), *callbacks, strategy=case.strategy(), devices=2, max_epochs=2, **case.trainer
    )
    trainer.fit(model)
    assert not any("forward" in module.__dict__ for module in model.blocks.modules())
    seen = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    return seen | {name: value.clone() for name, value in trainer.callback_metrics.items()}


def _check(name: str, folder: Path, rank: int) -> int:
    case = CASES[name]
    plain = _train(case, folder)
    callback = ActivationCheckpointing(case.policy)
    recomputed = _train(case, folder, callback)
    assert plain.keys() == recomputed.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, recomputed[name]), name
    return int(callback.technique_record().settings["num_modules"])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank found, by case."""
    with TwoRanks(_check, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_train_as_without_recomputing(name: str, found: TwoRanks) -> None:
    for result in found(name):
        assert isinstance(result, int), result
        if isinstance(CASES[name].policy, MemoryBudget):  # how many is up to how long each takes
            assert result > 0
        else:
            assert result == 4


def test_a_budget_is_refused_where_parameters_are_sharded() -> None:
    class Trainer:
        strategy = _fsdp2()
        callbacks: tuple[Any, ...] = ()

    with pytest.raises(
        MisconfigurationException, match=r"needs whole parameters .* but got ModelParallelStrategy"
    ):
        ActivationCheckpointing(MemoryBudget("1GiB")).setup(Trainer(), Net(), "fit")  # type: ignore[arg-type]
    with pytest.warns(NoEffectWarning, match=r"recomputes nothing: it needs whole parameters"):
        ActivationCheckpointing("auto").setup(Trainer(), Net(), "fit")  # type: ignore[arg-type]
