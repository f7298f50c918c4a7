"""Sparse recurrent layers and experts in two gloo processes, whole or divided by `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)]

ROWS, NUM_BATCHES, WIDTH = 8, 6, 8


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return sum((x @ self.up[number].t()).tanh() for number in range(3))


class Net(LightningModule):
    """Each rank takes its half of every batch; alone, a process takes the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, 1)
        self.double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        half = len(batch) // self.trainer.world_size
        rows = batch[self.global_rank * half : (self.global_rank + 1) * half]
        return (self.head(self.experts(self.lstm(rows)[0])) - rows.sum(2, keepdim=True)).square().mean()

    def train_dataloader(self) -> Any:
        rows = torch.randn(ROWS * NUM_BATCHES, 4, WIDTH, generator=torch.Generator().manual_seed(3)).double()
        return DataLoader(rows, batch_size=ROWS)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Sharded(Net):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for module in (self.lstm, self.experts, self.head, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def run(folder: Path, model: Net, **options: Any) -> Net:
    update = mt.sparsity.UpdateEvery(2, stop=1.0)
    callback = mt.SparseTraining(mt.sparsity.RigL(0.5, drop=0.5), update)
    trainer = quiet_trainer(folder, callback, max_epochs=2, use_distributed_sampler=False, **options)
    trainer.fit(model)
    return model


def checked(name: str, folder: Path, rank: int) -> Any:
    seed_everything(1, verbose=False)
    if name == "ddp":
        model = run(folder, Net(), devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    else:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        model = run(folder, Sharded(), devices=2, strategy=strategy)
    return {key: value.tolist() for key, value in mt.sparsity.export_dense(model).items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with TwoRanks(checked, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_two_ranks_train_as_one_process_on_the_joint_batch(
    name: str, found: TwoRanks, tmp_path: Path
) -> None:
    first, second = found(name)
    seed_everything(1, verbose=False)
    alone = run(tmp_path, Net())
    assert [*mt.sparsity.sparse_weights(alone)] == [
        *("lstm.weight_ih_l0", "lstm.weight_hh_l0", "experts.up", "head.weight")
    ]
    assert isinstance(first, dict), first
    assert first == second
    for key, value in mt.sparsity.export_dense(alone).items():
        joint = torch.tensor(first[key], dtype=torch.float64)
        torch.testing.assert_close(joint, value, rtol=1e-8, atol=1e-10)
