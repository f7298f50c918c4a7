"""Loss scaling in float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.precision.optimizers.grad_scaler import HalfGradScaler, ScalerConfig


def step(scaler: HalfGradScaler, weight: nn.Parameter, gradient: float) -> bool:
    """One step; whether it was done."""
    optimizer = torch.optim.SGD([weight], lr=1.0)
    done: list[bool] = []
    scaler.scale(torch.ones(()))
    weight.grad = torch.full_like(weight, gradient)
    scaler.unscale_(optimizer)
    scaler.step_if_finite(optimizer, lambda: done.append(True))
    scaler.update()
    return bool(done)


def test_gradients_in_float16_are_unscaled_and_infinite_ones_skipped() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    scaler = HalfGradScaler("cpu", ScalerConfig(init_scale=1024.0, growth_interval=2, max_scale=2048.0))
    assert step(scaler, weight, 512.0)
    assert weight.grad.tolist() == [0.5] * 3
    assert not step(scaler, weight, float("inf"))
    assert scaler.get_scale() == 512.0
    scales = []
    for _ in range(8):
        assert step(scaler, weight, 1.0)
        scales.append(scaler.get_scale())
    assert scales == [512.0, 1024.0, 1024.0, 2048.0, 2048.0, 2048.0, 2048.0, 2048.0]
    assert scaler.num_skipped == 1


def test_a_run_whose_every_step_is_skipped_ends() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    scaler = HalfGradScaler("cpu", ScalerConfig())
    for _ in range(39):
        assert not step(scaler, weight, float("nan"))
    with pytest.raises(
        FloatingPointError,
        match=r"in 40 steps in a row, while the loss scale fell from 32768 to .*keep the layer.*'bf16-true'. "
        r"The scales of these steps: 32768, 16384, 8192, .*, 1.19209e-07, 5.96046e-08.$",
    ):
        step(scaler, weight, float("nan"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"init_scale": 0.0},
            r"`ScalerConfig\(init_scale\)` must be greater than 0, but got init_scale=0.0. "
            r"Use a power of two",
        ),
        ({"init_scale": True}, r"must be greater than 0, but got init_scale=True. Use a power of two"),
        (
            {"growth_interval": 2.0},
            r"must be a whole number of at least 1, but got growth_interval=2.0. Use e.g.",
        ),
        (
            {"growth_interval": True},
            r"must be a whole number of at least 1, but got growth_interval=True. Use",
        ),
        (
            {"growth_interval": 0},
            r"growth_interval\)` must be a whole number .* got growth_interval=0. Use e.g. 2000",
        ),
        (
            {"max_scale": 2.0},
            r"max_scale\)` must be at least init_scale=32768.0, but got max_scale=2.0. Lower init_scale",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ScalerConfig(**arguments)
