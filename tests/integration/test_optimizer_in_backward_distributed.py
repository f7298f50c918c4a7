"""`OptimizerInBackward` in two gloo processes: ranks stay equal, and equal to plain DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow


class Net(LightningModule):
    """Batches differ between the ranks, and so would the running statistics of batch norm."""

    def __init__(self, adam: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 1)
        )
        self.unused = nn.Linear(2, 2)
        self.unused.requires_grad_(False)
        self.adam = adam

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True).tanh()).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.global_rank)
        return DataLoader([torch.randn(12, 6, generator=generator) for _ in range(12)], batch_size=None)

    def configure_optimizers(self) -> Any:
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


class Skips(Net):
    """One rank does without a layer in the last step, or in the only one."""

    skipped = 3

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.skipped and self.global_rank == 1:
            return self.net[0](batch).square().mean()
        return super().training_step(batch, batch_idx)


class HooksTheWrapper(Callback):
    """Registers what the strategy is not told of."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, default_hooks.allreduce_hook)


CASES: dict[str, tuple[bool, Callable[[], mt.OptimizerInBackward], dict[str, Any], bool]] = {
    "AdamW": (True, mt.OptimizerInBackward, {}, False),
    "SGD": (False, mt.OptimizerInBackward, {}, False),
    "clipped": (
        True,
        lambda: mt.OptimizerInBackward(clip_by_norm="two_pass"),
        {"gradient_clip_val": 0.1},
        False,
    ),
    "accumulated": (
        False,
        lambda: mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum()),
        {"accumulate_grad_batches": 3},
        False,
    ),
    "microbatched": (
        False,
        lambda: mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum()),
        {},
        True,
    ),
    "bfloat16": (True, mt.OptimizerInBackward, {"low": True}, False),
}
REFUSED: dict[str, tuple[dict[str, Any], mt.optimizer_in_backward.Accumulation | None, str]] = {
    "unused": ({"find_unused_parameters": True}, None, "find_unused_parameters=True"),
    "static": ({"static_graph": True}, None, "static_graph=True"),
    "hook": ({"ddp_comm_hook": print}, None, "ddp_comm_hook"),
    "hook on the wrapper": ({}, None, "register_comm_hook"),
    "AdamA": ({}, mt.optimizer_in_backward.AdamA(), "another optimizer state"),
}

SKIPPING = {
    "skips": None,
    "skips, accumulated": mt.optimizer_in_backward.ExactMomentum(),
    "skips at first": mt.optimizer_in_backward.ExactMomentum(),
}


def trained(folder: Path, model: Net, *callbacks: Any, **options: Any) -> Net:
    strategy = DDPStrategy(process_group_backend="gloo", **options.pop("ddp", {}))
    if options.pop("low", False):
        options["plugins"] = [mt.LowPrecision("bf16-true")]
    quiet_trainer(
        folder, *callbacks, devices=2, strategy=strategy, use_distributed_sampler=False, **options
    ).fit(model)
    return model


def check(name: str, folder: Path, rank: int) -> Any:
    if name in REFUSED:
        ddp, accumulation, message = REFUSED[name]
        others = [HooksTheWrapper()] if name == "hook on the wrapper" else []
        with pytest.raises(MisconfigurationException, match=message):
            trained(folder, Net(adam=True), mt.OptimizerInBackward(accumulation), *others, ddp=ddp)
        return True
    if name in SKIPPING:
        accumulation = SKIPPING[name]
        model, technique = Skips(adam=accumulation is None), mt.OptimizerInBackward(accumulation)
        model.skipped = 0 if name == "skips at first" else 3
        try:
            trained(folder, model, technique, limit_train_batches=model.skipped + 1)
        except RuntimeError as error:
            return str(error)
        return "went on"
    adam, make, options, microbatched = CASES[name]
    splitting = [mt.Microbatching(num_microbatches=3)] if microbatched else []
    plain = trained(folder, Net(adam), *splitting, **options)
    model = trained(folder, Net(adam), *splitting, make(), **options)
    return {
        "state": [value.tolist() for value in model.state_dict().values()],
        "distance": max(
            (p.double() - q.double()).abs().max().item()
            for p, q in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        ),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with TwoRanks(check, tmp_path_factory.mktemp("ddp")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_equal_and_equal_to_plain_ddp(name: str, found: TwoRanks) -> None:
    first, second = found(name)
    assert isinstance(first, dict), first
    for one, other, key in zip(first["state"], second["state"], Net(True).state_dict(), strict=True):
        if "running" not in key:  # plain DDP, too, broadcasts these before the next forward only
            assert one == other
    if name in ("AdamW", "SGD", "clipped"):
        assert first["distance"] == 0
    elif name != "bfloat16":  # whose noise is another
        assert first["distance"] < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_works_on_buckets_is_refused(name: str, found: TwoRanks) -> None:
    assert found(name) == [True, True]


@pytest.mark.parametrize("name", SKIPPING)
def test_a_rank_without_a_gradient_says_so_and_nobody_waits(name: str, found: TwoRanks) -> None:
    first, second = found(name)
    assert "needs a gradient of every parameter in every backward, but 6 got none" in second
    assert first == "went on"
