"""Microbatches in a Trainer of `pytorch_lightning`, also beside its strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from tests.helpers.trainers import LIGHTNING_WARNINGS

pl = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


class Steps:
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.num_chunks = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.num_chunks += 1
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Model(Steps, pl.LightningModule):
    pass


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


@pytest.mark.usefixtures("no_process_group_is_left")
@pytest.mark.parametrize("package", [pl, lightning.pytorch], ids=["pytorch_lightning", "lightning"])
def test_the_callback_is_all_it_takes_beside_a_strategy_by_name(package: Any, tmp_path: Path) -> None:
    batches = DataLoader(torch.randn(64, 4, dtype=torch.float64), batch_size=32)

    class Theirs(Steps, package.LightningModule):
        pass

    def trained(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        model = Theirs()
        trainer = package.Trainer(
            default_root_dir=tmp_path, max_epochs=2, strategy="ddp", accelerator="cpu", devices=1,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=list(callbacks), logger=False,
        )  # fmt: skip
        trainer.fit(model, batches)
        return model

    plain, split = trained(), trained(mt.Microbatching(num_microbatches=4))
    assert (plain.num_chunks, split.num_chunks) == (4, 16)
    for one, other in zip(plain.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
