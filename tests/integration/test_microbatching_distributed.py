"""Microbatching in two gloo processes equals plain Lightning in two gloo processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_memtrain.microbatching import Microbatching
from tests.helpers.faults import FailAt
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow

NUM_BATCHES = 8


class NumSamples(Metric):
    """How many samples there were: of a batch on the step, of all ranks over the epoch."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, batch: Tensor) -> None:
        self.total += len(batch)

    def compute(self) -> Tensor:
        return self.total


class Net(LightningModule):
    """A mean over samples, on batches that differ between the ranks."""

    def __init__(self, samples: tuple[int, int] = (23, 23)) -> None:
        super().__init__()
        self.samples = samples
        self.first, self.second, self.head = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.num_samples = NumSamples()
        self.unused = nn.Linear(4, 4) if type(self) is WithUnused else None
        self.double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.first(batch).tanh()
        loss = self.head(self.second(hidden).tanh()).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", loss, on_step=True)
        self.num_samples(batch)
        self.log("num_samples", self.num_samples, on_step=True, on_epoch=True)
        return loss

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.global_rank)
        size = (self.samples[self.global_rank], 6)
        batches = [torch.randn(*size, generator=generator, dtype=torch.float64) for _ in range(NUM_BATCHES)]
        return DataLoader(batches, batch_size=None)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


class WithUnused(Net):
    """Parameters without a gradient, which the optimizer must leave alone."""


class Sharded(Net):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for module in (self.first, self.second, self.head):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Reductions(TorchDispatchMode):
    """Counts how often gradients are reduced to shards."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.c10d._reduce_scatter_base_.default
        return func(*args, **(kwargs or {}))


class Counter(Callback):
    """Counts buckets that DDP reduces and reductions of FSDP2, and keeps gradients and logs."""

    def __init__(self) -> None:
        self.num_reduced = 0
        self.reductions: Reductions | None = None
        self.seen: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):
            self.num_reduced += 1
            return allreduce_hook(None, bucket)

        if hasattr(trainer.strategy.model, "register_comm_hook"):
            trainer.strategy.model.register_comm_hook(None, hook)
        else:
            self.reductions = Reductions()
            self.reductions.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reductions is not None:
            self.reductions.__exit__(None, None, None)
            self.num_reduced = self.reductions.count

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters()]
        self.seen += [None if g is None else _whole(g).clone() for g in gradients]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen += _values(trainer.logged_metrics)
        self.seen += [torch.tensor(trainer.global_step)]


def _values(metrics: Any) -> list[Tensor]:
    return [torch.as_tensor(v).clone() for key, v in metrics.items() if not key.startswith("microbatching/")]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@dataclass
class Case:
    split: Callable[[], Any] = lambda: Microbatching(num_microbatches=3)
    strategy: Callable[[], Any] = lambda: DDPStrategy()
    model: Callable[[], LightningModule] = Net
    trainer: dict[str, Any] = field(default_factory=dict)
    fail: Callable[[int], Any] | None = None
    """Of a rank, the callback that makes its device run out of memory."""


def _auto(size: str = "1GiB") -> Microbatching:
    return Microbatching(microbatch_size="auto", limit=size)


def _fails_on_rank_1(where: str, batch_idx: int) -> Callable[[int], Any]:
    return lambda rank: FailAt(where, batch_idx) if rank == 1 else Callback()


CASES = {
    "ddp": Case(),
    "accumulated": Case(trainer={"accumulate_grad_batches": 2}),
    "unused parameters": Case(strategy=lambda: DDPStrategy(find_unused_parameters=True), model=WithUnused),
    "bucket views": Case(strategy=lambda: DDPStrategy(gradient_as_bucket_view=True)),
    "static graph": Case(strategy=lambda: DDPStrategy(static_graph=True)),
    "different counts": Case(
        lambda: Microbatching(microbatch_size=4),
        model=lambda: Net((9, 23)),
        trainer={"gradient_clip_val": 0.05},
    ),
    "ddp by its name": Case(strategy=lambda: "ddp"),
    "fsdp2": Case(
        strategy=lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), model=Sharded
    ),
    "fsdp2, reduced once": Case(
        lambda: Microbatching(num_microbatches=3, sync_each_chunk=False),
        strategy=lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        model=Sharded,
        trainer={"accumulate_grad_batches": 2},
    ),
    "fsdp2, different counts": Case(
        lambda: Microbatching(microbatch_size=4),
        strategy=lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        model=lambda: Sharded((9, 23)),
    ),
    "auto": Case(_auto),
    "auto, accumulated": Case(_auto, trainer={"accumulate_grad_batches": 2}),
    "auto, unused parameters": Case(
        _auto, strategy=lambda: DDPStrategy(find_unused_parameters=True), model=WithUnused
    ),
    "auto, a rank fails in forward": Case(_auto, fail=_fails_on_rank_1("forward", 2)),
    "auto, a rank fails in backward": Case(_auto, fail=_fails_on_rank_1("backward", 3)),
    "auto, a rank fails amid a window": Case(
        _auto, trainer={"accumulate_grad_batches": 3}, fail=_fails_on_rank_1("backward", 1)
    ),
}


def _train(case: Case, folder: Path, strategy: Any, *callbacks: Any) -> tuple[list[Any], int, Any]:
    counter = Counter()
    torch.manual_seed(0)
    model = case.model()
    trainer = quiet_trainer(folder, counter, *callbacks, strategy=strategy, devices=2, **case.trainer)
    trainer.fit(model)
    seen = [*counter.seen, *(_whole(p) for p in model.parameters())]
    seen += _values(trainer.callback_metrics)
    return seen, counter.num_reduced, trainer


def _check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    case = CASES[name]
    plain, num_plain, _ = _train(case, folder, case.strategy())
    callbacks = [] if case.fail is None else [case.fail(rank)]
    split, num_split, trainer = _train(case, folder, case.strategy(), case.split(), *callbacks)
    for one, other in zip(plain, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    events = [
        e for c in trainer.callbacks if isinstance(c, Microbatching) for e in c.technique_record().events
    ]
    return {"reduced": [num_plain, num_split], "compared": len(plain), "events": events}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank found, by case."""
    with TwoRanks(_check, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_train_as_without_splitting(name: str, found: TwoRanks) -> None:
    for result in found(name):
        assert isinstance(result, dict), result
        assert result["compared"] > 30


@pytest.mark.parametrize("name", [name for name in CASES if "different counts" not in name])
def test_gradients_are_reduced_as_often_as_without_splitting(name: str, found: TwoRanks) -> None:
    num_plain, num_split = found(name)[0]["reduced"]
    assert num_plain > 0
    # DDP must communicate in every backward of a static graph, here in three chunks, and FSDP2 does unless it
    # is told to wait.
    assert num_split == (3 * num_plain if name in ("static graph", "fsdp2") else num_plain)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fail is not None])
def test_both_ranks_shrink_when_one_is_out_of_memory(name: str, found: TwoRanks) -> None:
    events = [[e for e in result["events"] if "out of memory" in e] for result in found(name)]
    assert sorted("another rank" in one[0] for one in events) == [False, True]
    assert len(events[0]) == len(events[1]) == 1
    for (event,) in events:
        assert "out of memory " in event
        assert event.endswith(" at microbatch_size=23; microbatch_size=12 from here")
