"""Microbatches and the strategies that bring them along in a Trainer of `pytorch_lightning`."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from tests.helpers.trainers import LIGHTNING_WARNINGS

pl = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.num_chunks = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.num_chunks += 1
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Clipping(Model):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("kind", [Model, Clipping])
def test_automatic_microbatches_train_as_without(kind: type[Model], tmp_path: Path) -> None:
    def trained(*callbacks: Any) -> Model:
        torch.manual_seed(0)
        model = kind()
        trainer = pl.Trainer(
            default_root_dir=tmp_path, max_epochs=2, callbacks=[*callbacks], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader(torch.randn(1024, 4, dtype=torch.float64), batch_size=512))
        return model

    auto = mt.Microbatching(microbatch_size="auto", limit="80KiB")
    plain, split = trained(), trained(auto)
    assert auto.microbatch_size is not None
    assert auto.microbatch_size < 512
    for one, other in zip(plain.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.fixture
def no_process_group_is_left() -> Any:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trainer_of(package: Any, folder: Path, strategy: Any) -> Any:
    return package.Trainer(
        default_root_dir=folder, max_epochs=2, strategy=strategy, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.usefixtures("no_process_group_is_left")
def test_a_strategy_brings_microbatches_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, model = Model(), Model()
    model.load_state_dict(plain.state_dict())
    batches = DataLoader(torch.randn(64, 4, dtype=torch.float64), batch_size=32)
    trainer_of(pl, tmp_path, "ddp").fit(plain, batches)
    microbatching = mt.Microbatching(num_microbatches=4)
    trainer = trainer_of(pl, tmp_path, mt.MemtrainDDPStrategy(microbatching))
    trainer.fit(model, batches)
    assert trainer.callbacks.count(microbatching) == 1
    assert (plain.num_chunks, model.num_chunks) == (4, 16)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["memtrain_ddp", "memtrain_fsdp"])
def test_strategies_of_both_packages_are_their_own(name: str, tmp_path: Path) -> None:
    base = {"memtrain_ddp": "DDPStrategy", "memtrain_fsdp": "FSDPStrategy"}[name]
    for package in (pl, lightning.pytorch):
        kind = package.strategies.StrategyRegistry.get(name)
        if name == "memtrain_fsdp":  # a Trainer wants a GPU for it
            kind.accelerator = package.accelerators.CPUAccelerator()
        else:
            kind = trainer_of(package, tmp_path, name).strategy
        assert kind.strategy_name == name
        other = {pl: lightning.pytorch, lightning.pytorch: pl}[package]
        assert isinstance(kind, getattr(package.strategies, base))
        assert not type(kind).__mro__.count(getattr(other.strategies, base))


def test_a_strategy_can_go_to_a_process_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(pl, tmp_path, mt.MemtrainDDPStrategy(mt.Microbatching(num_microbatches=2)))
    kind = pickle.loads(pickle.dumps(type(trainer.strategy)))
    assert kind is type(trainer.strategy)
    assert issubclass(kind, pl.strategies.DDPStrategy)


def test_a_strategy_that_is_derived_from_ours_is_refused(tmp_path: Path) -> None:
    class Own(mt.MemtrainDDPStrategy):
        pass

    with pytest.raises(MisconfigurationException, match=r"but got Own, which is derived from .* `lightning`"):
        trainer_of(pl, tmp_path, Own())
    assert isinstance(trainer_of(lightning.pytorch, tmp_path, Own()).strategy, Own)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("order", [1, -1])
def test_names_are_known_whichever_is_imported_first(package: str, order: int) -> None:
    imports = [f"import {package} as pl", "import lightning_memtrain as mt"][::order]
    lines = [
        *imports,
        "kind = pl.strategies.StrategyRegistry.get('memtrain_ddp')",
        "print(type(kind).__name__)",
    ]
    if order < 0:  # nothing of Lightning has been imported by that alone
        lines.insert(1, "import sys; assert 'torch' not in sys.modules")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "MemtrainDDPStrategy", ran.stderr
