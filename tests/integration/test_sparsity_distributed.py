"""`SparseTraining` in two gloo processes: equal patterns, and the weights of one process on all rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.coordination import gradient_sync
from lightning_memtrain.sparsity import distributed
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)]

ROWS, NUM_BATCHES, WIDTH = 8, 8, 6


class Net(LightningModule):
    """Each rank takes its half of every batch; alone, a process takes the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1)
        )
        self.double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # Whatever chunks of even length a rank makes of the batch, these are its samples.
        rows = batch[self.global_rank :: self.trainer.world_size]
        return (self.net(rows) - rows.sum(1, keepdim=True).tanh()).square().mean()

    def train_dataloader(self) -> Any:
        rows = torch.randn(ROWS * NUM_BATCHES, WIDTH, generator=torch.Generator().manual_seed(3)).double()
        return DataLoader(rows, batch_size=ROWS)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Cramped(Net):
    """The last rank has room for two rows at a time."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(batch) > 2 and self.global_rank == self.trainer.world_size - 1:
            raise torch.OutOfMemoryError("no room for more than two rows")
        return super().training_step(batch, batch_idx)


class Drifts(Net):
    """One rank changes its weights behind everyone's back."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and self.global_rank == 1:
            with torch.no_grad():
                self.net[0].values.copy_(self.net[0].values.flip(0) * 2)


METHODS: dict[str, Any] = {
    "StaticSparse": lambda: mt.sparsity.StaticSparse(0.5),
    "SET": lambda: mt.sparsity.SET(0.5, drop=0.5),
    # As many candidates as there are inactive positions, so that the choice is the one of a single process.
    "RigL": lambda: mt.sparsity.RigL(0.5, drop=0.5),
    "DSR": lambda: mt.sparsity.DSR(0.5, threshold=0.05),
    "GMP": lambda: mt.sparsity.GradualMagnitudePruning(0.5),
}
AUTO = {"microbatch_size": "auto", "limit": "1GiB"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in METHODS},
    "RigL, accumulated": {"accumulate_grad_batches": 2},
    "DSR, clipped": {"gradient_clip_val": 0.1},
    "DSR, static graph": {"ddp": {"static_graph": True}},
    "DSR, bucket views": {"ddp": {"gradient_as_bucket_view": True}},
    "RigL, microbatched": {"microbatches": {"num_microbatches": 2}},
    "StaticSparse, auto": {"make": Cramped, "microbatches": AUTO},
    "SET, auto, accumulated": {"make": Cramped, "microbatches": AUTO, "accumulate_grad_batches": 2},
    "RigL, auto": {"make": Cramped, "microbatches": AUTO},
    "DSR, auto, clipped": {"make": Cramped, "microbatches": AUTO, "gradient_clip_val": 0.1},
}


def run(name: str, folder: Path, seed: int, **options: Any) -> Net:
    method = METHODS[name.partition(",")[0]]()
    options = OPTIONS[name] | options
    update = None if method.default_update is None else mt.sparsity.UpdateEvery(2, stop=1.0)
    callbacks: list[Any] = [mt.SparseTraining(method, update)]
    if microbatches := options.pop("microbatches", None):
        callbacks.append(mt.Microbatching(**microbatches))
    ddp, checkpoint = options.pop("ddp", {}), options.pop("ckpt_path", None)
    if options.get("devices") == 2:
        options["strategy"] = DDPStrategy(process_group_backend="gloo", **ddp)
    seed_everything(seed, verbose=False)
    model = options.pop("make", Net)()
    trainer = quiet_trainer(folder, *callbacks, max_epochs=2, use_distributed_sampler=False, **options)
    trainer.fit(model, ckpt_path=checkpoint)
    return model


def checked(name: str, folder: Path, rank: int) -> Any:
    if name == "drift":
        try:
            run("SET", folder, 1, devices=2, make=Drifts)
        except RuntimeError as error:
            return str(error)
        return "no error"
    if name == "half":
        run("RigL", folder, 1, devices=2, max_steps=NUM_BATCHES).trainer.save_checkpoint(folder / "half.ckpt")
        return None
    # Ranks begin with other weights: those of rank 0 count, as in plain DDP.
    model = run(name, folder, seed=1 + rank, devices=2)
    return {
        "values": {key: one.values.tolist() for key, one in mt.sparsity.sparse_weights(model).items()},
        "patterns": {key: one.positions().tolist() for key, one in mt.sparsity.sparse_weights(model).items()},
        "biases": [layer.bias.tolist() for layer in model.net[::2]],
        "leftover": hasattr(model, distributed._IGNORED) or bool(gradient_sync._averaging),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank has after a case."""
    with TwoRanks(checked, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


def assert_trained_alike(rank: dict[str, Any], alone: Net) -> None:
    for key, weight in mt.sparsity.sparse_weights(alone).items():
        assert rank["patterns"][key] == weight.positions().tolist(), key
        values = torch.tensor(rank["values"][key], dtype=torch.float64)
        torch.testing.assert_close(values, weight.values.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_train_as_one_process_on_the_joint_batch(
    name: str, found: TwoRanks, tmp_path: Path
) -> None:
    first, second = found(name)
    assert isinstance(first, dict), first
    assert first == second
    assert not first["leftover"]
    assert_trained_alike(first, run(name, tmp_path, seed=1))


def test_ranks_that_differ_are_told_of_at_the_next_update(found: TwoRanks) -> None:
    first, second = found("drift")
    assert "differs between rank 0 and rank 1 after the update of step 4" in first
    assert "gradients that were not averaged over ranks" in first
    assert "'net.0'" in first
    assert first == second


def test_one_process_goes_on_where_two_have_stopped(found: TwoRanks, tmp_path: Path) -> None:
    assert found("half") == [None, None]
    resumed = run("RigL", tmp_path, seed=1, ckpt_path=found.folder / "half.ckpt")
    assert_trained_alike(found("RigL")[0], resumed)
