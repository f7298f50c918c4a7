"""A noisy regression that shows what rounding does to training: a network learns from another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.precision.optimizers.bucketed_step import BucketedStep
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise

INPUTS, WIDTH, BATCH_SIZE = 16, 64, 64
NOISE = 0.1

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


@dataclass(frozen=True)
class Format:
    """How weights are kept.

    Args:
        dtype: of weights, gradients and activations.
        stochastic: round weights stochastically, by steps in float32; else the optimizer works on them as
            they are.
    """

    dtype: torch.dtype
    stochastic: bool = False


FORMATS = {
    "fp32": Format(torch.float32),
    "bf16, nearest": Format(torch.bfloat16),
    "bf16, stochastic": Format(torch.bfloat16, stochastic=True),
}


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
        )


class Data:
    """Inputs, and what a fixed network makes of them; in training with noise.

    Args:
        seed: of network and noise.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(1000 + seed)
        self._teacher = network(2000 + seed)
        for p in self._teacher.parameters():
            p.data.mul_(1.5)
        scale = self._teacher(torch.randn(4096, INPUTS, generator=self._generator)).std()
        self._teacher[-1].weight.data.div_(scale)
        self._teacher[-1].bias.data.zero_()

    @torch.no_grad()
    def batch(self, size: int = BATCH_SIZE, noise: float = NOISE) -> tuple[Tensor, Tensor]:
        """Inputs and answers that were never given before."""
        x = torch.randn(size, INPUTS, generator=self._generator)
        return x, self._teacher(x) + noise * torch.randn(size, 1, generator=self._generator)


def validation_loss(kept: Format, make_optimizer: MakeOptimizer, seed: int, num_steps: int) -> float:
    """Train and validate.

    Args:
        kept: how weights are kept.
        make_optimizer: makes the optimizer from parameters.
        seed: of everything.
        num_steps: optimizer steps, each on a batch that was never seen.

    Returns:
        Mean squared error on 4096 other inputs, computed in the precision of the weights.
    """
    data, model = Data(seed), network(seed).to(kept.dtype)
    optimizer = make_optimizer(model.parameters())
    step: Callable[[], Any] = optimizer.step
    if kept.stochastic:
        step = BucketedStep(optimizer, RoundingNoise(seed)).step
    x_val, y_val = data.batch(4096)
    for _ in range(num_steps):
        x, y = data.batch()
        loss = (model(x.to(kept.dtype)).float() - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        step()
    with torch.no_grad():
        return (model(x_val.to(kept.dtype)).float() - y_val).square().mean().item()
