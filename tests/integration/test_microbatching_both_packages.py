"""Automatic microbatches in a Trainer of `pytorch_lightning`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
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
