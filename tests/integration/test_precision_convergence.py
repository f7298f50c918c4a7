"""bf16 weights with stochastic rounding learn what float32 learns, where rounding to nearest stalls."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest
import torch

from benchmarks.precision_regression import FORMATS, MakeOptimizer, validation_loss
from lightning_memtrain.precision import SGD8bit, adamw8bit

pytestmark = pytest.mark.slow

NUM_STEPS = 1000
SEEDS = range(3)

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=3e-4),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=3e-3, momentum=0.9),
    "SGD8bit": lambda ps: SGD8bit(ps, lr=3e-3, momentum=0.9),
    "adamw8bit": lambda ps: adamw8bit(ps, lr=3e-4),
}


@cache
def loss(optimizer: str, kept: str, seed: int, num_steps: int = NUM_STEPS) -> float:
    return validation_loss(FORMATS[kept], OPTIMIZERS[optimizer], seed, num_steps)


def mean_loss(optimizer: str, kept: str) -> float:
    return sum(loss(optimizer, kept, seed) for seed in SEEDS) / len(SEEDS)


def reference(optimizer: str) -> str:
    """What float32 means: for SGD, state in float32, too; bitsandbytes' Adam only differs in its weights."""
    return {"SGD8bit": "SGD"}.get(optimizer, optimizer)


@pytest.fixture
def in_float32(optimizer: str) -> float:
    """The mean loss to be reached; a fixture, since each half of the test takes long enough."""
    if optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    return mean_loss(reference(optimizer), "fp32")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stochastic_rounding_is_within_one_per_cent_of_float32(optimizer: str, in_float32: float) -> None:
    assert mean_loss(optimizer, "bf16, stochastic") / in_float32 == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_rounding_to_nearest_is_far_worse(optimizer: str) -> None:
    nearest, in_float32 = (loss(optimizer, kept, 0, 2 * NUM_STEPS) for kept in ("bf16, nearest", "fp32"))
    assert nearest > 1.2 * in_float32
