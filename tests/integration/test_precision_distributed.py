"""`LowPrecision` in two gloo processes: both ranks keep equal weights, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.precision import LowPrecision, ScalerConfig
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow


class Net(LightningModule):
    """A normalisation in float32 between layers in half precision; batches differ between the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True).tanh()).square().mean()
        if batch_idx == 5 and self.global_rank == 1 and self.dtype == torch.float16:
            loss = loss * 60000.0  # infinite gradients on one rank are infinite on both
        self.log("loss", loss.float(), sync_dist=True)
        return loss

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.global_rank)
        return DataLoader([torch.randn(12, 6, generator=generator) for _ in range(24)], batch_size=None)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "bf16": ("bf16-true", {}, False),
    "bf16, microbatched": ("bf16-true", {}, True),
    "bf16, bucket views": ("bf16-true", {"gradient_as_bucket_view": True}, False),
    "fp16": ("16-true", {}, False),
    "fp16, microbatched": ("16-true", {"gradient_as_bucket_view": True}, True),
    "fp32": ("32-true", {}, False),
}


def check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    precision, options, microbatched = CASES[name]
    torch.manual_seed(0)
    model = Net()
    plugin = LowPrecision(
        precision,  # type: ignore[arg-type]
        scaler=ScalerConfig(init_scale=1024.0) if precision == "16-true" else None,
        bucket_numel=None if precision == "32-true" else 40,
    )
    callbacks = [Microbatching(num_microbatches=3)] if microbatched else []
    trainer = quiet_trainer(
        folder,
        *callbacks,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", **options),
        plugins=[plugin],
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(model)
    return {
        "weights": [p.tolist() for p in model.parameters()],
        "loss": trainer.callback_metrics["loss"].item(),
        "scale": None if plugin.scaler is None else plugin.scaler.get_scale(),
        "steps": sorted({int(s["step"]) for s in trainer.optimizers[0].state.values()}),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with TwoRanks(check, tmp_path_factory.mktemp("ddp")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_keep_equal_weights_that_have_learnt(name: str, found: TwoRanks) -> None:
    first, second = found(name)
    assert isinstance(first, dict), first
    assert first["weights"] == second["weights"]
    assert first["loss"] == pytest.approx(found("fp32")[0]["loss"], rel=0.1)
    half = CASES[name][0] == "16-true"
    assert first["scale"] == second["scale"] == (512.0 if half else None)
    assert first["steps"] == second["steps"] == [23 if half else 24]
