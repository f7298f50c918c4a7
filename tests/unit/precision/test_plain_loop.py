"""Low precision without a Trainer: the functions that the plugin is made of give what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.optimizer_in_backward import OptimizerInBackward, step_in_backward
from lightning_memtrain.precision import (
    BucketedStep,
    HalfGradScaler,
    LowPrecision,
    RoundingNoise,
    ScalerConfig,
    cast_batch,
    convert_to_low_precision_,
    restore_float32_,
)
from tests.helpers.trainers import quiet_trainer

CONFIG = ScalerConfig(init_scale=1024.0, growth_interval=2)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return (self.layers(inputs) - targets).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 6, generator=generator), torch.randn(5, 1, generator=generator)) for _ in range(4)
    ]


def trained_by_the_plugin(plugin: LowPrecision, tmp_path: Path, *callbacks: Callback) -> Net:
    model = Net()
    trainer = quiet_trainer(tmp_path, *callbacks, plugins=[plugin], max_epochs=1)
    trainer.fit(model, DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q)


@pytest.mark.parametrize("in_backward", [False, True])
def test_bfloat16(in_backward: bool, tmp_path: Path) -> None:
    model = Net()
    convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=("norm",))
    optimizer = model.configure_optimizers()
    bucketed = BucketedStep(optimizer, RoundingNoise(seed=3), bucket_numel=40)
    stepping = step_in_backward(optimizer, step_parameter=lambda _, p: bucketed.step_parameter(p))
    for number, batch in enumerate(batches()):
        loss = model.training_step(cast_batch(batch, torch.bfloat16), number)
        if in_backward:
            stepping.backward(loss)
        else:
            loss.backward()
        bucketed.step()
        optimizer.zero_grad()
    assert model.layers[0].weight.dtype == torch.bfloat16
    assert stepping.num_stepped == (24 if in_backward else 0)
    callbacks = [OptimizerInBackward()] if in_backward else []
    assert_equal(model, trained_by_the_plugin(LowPrecision(seed=3, bucket_numel=40), tmp_path, *callbacks))


def test_float16(tmp_path: Path) -> None:
    model = Net()
    convert_to_low_precision_(model, torch.float16)
    optimizer = model.configure_optimizers()
    bucketed, scaler = BucketedStep(optimizer), HalfGradScaler("cpu", CONFIG)
    for number, batch in enumerate(batches()):
        scaler.scale(model.training_step(cast_batch(batch, torch.float16), number).float()).backward()
        scaler.unscale_(optimizer)
        scaler.step_if_finite(optimizer, bucketed.step)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 4096.0
    assert_equal(model, trained_by_the_plugin(LowPrecision("16-true", scaler=CONFIG), tmp_path))


def test_a_model_in_float32_again() -> None:
    model = Net()
    plain = Net()
    convert_to_low_precision_(model)
    restore_float32_(model)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p.bfloat16(), q.bfloat16())
    assert model.layers(torch.ones(1, 6)).dtype == torch.float32
