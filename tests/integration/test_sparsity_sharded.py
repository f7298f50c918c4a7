"""`SparseTraining` with values that `fully_shard` divides among two gloo processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)]

ROWS, NUM_BATCHES, WIDTH = 8, 8, 6


def _layers() -> nn.Module:
    # 33 values of 66 weights, 28 of 55, 3 of 5: shards of the two ranks differ in size.
    layers = nn.Linear(WIDTH, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 1)
    return nn.Sequential(*layers).double()


class Net(LightningModule):
    """Each rank takes its half of every batch; alone, a process takes the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _layers()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        half = len(batch) // self.trainer.world_size
        rows = batch[self.global_rank * half : (self.global_rank + 1) * half]
        return (self.net(rows) - rows.sum(1, keepdim=True).tanh()).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def train_dataloader(self) -> Any:
        rows = torch.randn(ROWS * NUM_BATCHES, WIDTH, generator=torch.Generator().manual_seed(3)).double()
        return DataLoader(rows, batch_size=ROWS)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)

    def shard(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net[2], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Sharded(Net):
    def configure_model(self) -> None:
        self.shard()


class BuiltLate(Net):
    """Makes its layers in the hook that shards them, and says so in between."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        self.net = _layers()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, mt.SparseTraining):
                callback.convert(self)
        self.shard()


class NeverConverted(BuiltLate):
    def configure_model(self) -> None:
        self.net = _layers()
        self.shard()


class LateHead(Sharded):
    """Only some layers are there in time."""

    def configure_model(self) -> None:
        self.net.append(nn.Linear(1, 1).double())
        self.shard()


class OnMeta(Net):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        with torch.device("meta"):
            self.net = _layers()

    def configure_model(self) -> None:
        self.shard()


class InCodes(Sharded):
    def configure_optimizers(self) -> Any:
        return mt.precision.SGD8bit(self.parameters(), lr=0.1, momentum=0.9)


class Whole(Net):
    """Nothing is sharded."""

    def configure_model(self) -> None:
        pass


class Watch(Callback):
    """What is divided outside of forward and backward, and how many entries of it this rank has."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.sizes: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for weight in mt.sparsity.sparse_weights(pl_module).values():
            state = trainer.optimizers[0].state[weight.values]
            if not state:  # gradients are accumulated before the first step
                return
            seen = [weight.values.data, weight.values.grad, state["exp_avg"], state["exp_avg_sq"]]
            self.kinds |= {type(tensor).__name__ for tensor in seen}
            self.sizes.append([tensor.to_local().numel() for tensor in seen if isinstance(tensor, DTensor)])


class CountedSET(mt.sparsity.SET):
    """Notes how many layers have whole values at once."""

    num_layers: ClassVar[list[int]] = []

    def update(self, layers: Any, moment: Any, state: Any) -> Any:
        self.num_layers.append(len(layers))
        return super().update(layers, moment, state)


METHODS: dict[str, Any] = {
    "StaticSparse": lambda: mt.sparsity.StaticSparse(0.5),
    "SET": lambda: CountedSET(0.5, drop=0.5),
    # As many candidates as there are inactive positions, so that the choice is the one of a single process.
    "RigL": lambda: mt.sparsity.RigL(0.5, drop=0.5),
    "DSR": lambda: mt.sparsity.DSR(0.5, threshold=0.05),
    "GMP": lambda: mt.sparsity.GradualMagnitudePruning(0.5),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "StaticSparse": {},
    "SET": {},
    "RigL": {},
    "SET, made late": {"make": BuiltLate},
    "SET, clipped": {"gradient_clip_val": 0.1},
    "SET, validated": {"val_check_interval": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1},
    "SET, int32": {"storage": "int32"},
    "RigL, accumulated": {"accumulate_grad_batches": 2},
    "RigL, microbatched": {"microbatched": True},
}
REFUSED: dict[str, Any] = {
    "DSR": Sharded,
    "GMP": Sharded,
    "SET, never converted": NeverConverted,
    "SET, late head": LateHead,
    "SET, meta": OnMeta,
    "SET, whole": Whole,
    "SET, state in codes": InCodes,
}


def run(name: str, folder: Path, devices: int, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    method = METHODS[name.partition(",")[0]]()
    options = OPTIONS.get(name, {}) | options
    make = options.pop("make", Sharded)
    update = None if method.default_update is None else mt.sparsity.UpdateEvery(2, stop=1.0)
    sparse = mt.SparseTraining(method, update, storage=options.pop("storage", "auto"))
    microbatches = [mt.Microbatching(num_microbatches=2)] if options.pop("microbatched", False) else []
    if devices == 2:
        options["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    seed_everything(1, verbose=False)
    model = make() if devices == 2 else Net()
    trainer = quiet_trainer(
        folder,
        sparse,
        *microbatches,
        *callbacks,
        devices=devices,
        use_distributed_sampler=False,
        **{"max_epochs": 2, "limit_val_batches": 0} | options,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


def _seen(model: Net) -> dict[str, Any]:
    return {
        "weights": {key: value.tolist() for key, value in mt.sparsity.export_dense(model).items()},
        "patterns": {key: one.positions().tolist() for key, one in mt.sparsity.sparse_weights(model).items()},
    }


def checked(name: str, folder: Path, rank: int) -> Any:
    if name in REFUSED:
        try:
            run(name, folder, 2, make=REFUSED[name])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"
    if name == "resumed":
        _, trainer = run("SET", folder, 2, max_epochs=1)
        path = folder / "half"
        trainer.save_checkpoint(path)
        model, trainer = run("SET", folder, 2, ckpt_path=path)
        return _seen(model)
    watch = Watch()
    CountedSET.num_layers.clear()
    model, _ = run(name, folder, 2, watch)
    return _seen(model) | {
        "kinds": sorted(watch.kinds),
        "sizes": watch.sizes[-3:],
        "num_layers": list(CountedSET.num_layers),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank found, by case."""
    with TwoRanks(checked, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_train_as_one_process_on_the_joint_batch(
    name: str, found: TwoRanks, tmp_path: Path
) -> None:
    first, second = found(name)
    assert isinstance(first, dict), first
    for key in ("weights", "patterns"):
        assert first[key] == second[key]
    options = {key: value for key, value in OPTIONS[name].items() if key != "make"}
    alone, _ = run(name, tmp_path, 1, **options)
    for key, weight in mt.sparsity.sparse_weights(alone).items():
        assert first["patterns"][key] == weight.positions().tolist()
    for key, dense in mt.sparsity.export_dense(alone).items():
        weights = torch.tensor(first["weights"][key], dtype=torch.float64)
        torch.testing.assert_close(weights, dense, rtol=1e-8, atol=1e-10)
    assert first["kinds"] == second["kinds"] == ["DTensor"]
    # 33, 28 and 3 values: of each tensor, a rank has its shard and no more.
    assert first["sizes"] == [[17] * 4, [14] * 4, [2] * 4]
    assert second["sizes"] == [[16] * 4, [14] * 4, [1] * 4]
    # Two epochs of eight steps, every second with an update, which makes one of three layers whole at a time.
    assert first["num_layers"] == ([1] * (8 * 3) if name.startswith("SET") else [])


def test_a_resumed_run_equals_the_uninterrupted_one(found: TwoRanks) -> None:
    for resumed, straight in zip(found("resumed"), found("SET"), strict=True):
        assert isinstance(resumed, dict), resumed
        assert resumed == {key: straight[key] for key in ("weights", "patterns")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "DSR",
            r"`SparseTraining\(method\)` must keep the number .* but got DSR.* Use RigL, SET",
        ),
        ("GMP", r"must keep the number .* but got GradualMagnitudePruning.* Use RigL, SET or StaticSparse"),
        ("SET, never converted", r"'net\.0' was made in `configure_model`\. Make it in `__init__`, call"),
        ("SET, late head", r"'net\.5' was made in `configure_model`"),
        ("SET, meta", r"'net\.0\.weight' is on meta\. Make the model on the CPU"),
        ("SET, state in codes", r"`SGD8bit\(params\)` must be whole tensors"),
        ("SET, whole", r"those of 'net\.0' are whole\. Call `fully_shard` in `configure_model`"),
    ],
)
def test_what_cannot_work_is_refused(name: str, message: str, found: TwoRanks) -> None:
    for error in found(name):
        assert error.startswith(("MisconfigurationException: ", "ArgumentError: "))
        assert re.search(message, error), error
