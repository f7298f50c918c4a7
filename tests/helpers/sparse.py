"""Small models, patterns for them, and the dense model with masks that a sparse one has to equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet


class TinyTransformer(nn.Module):
    """Two layers of attention and feed-forward, each of linear layers, with a token embedding."""

    def __init__(self, width: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width, bias=False),
                }
            )
            for _ in range(num_layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            query, key, value = layer["qkv"](layer["norm1"](x)).chunk(3, dim=-1)
            attended = nn.functional.scaled_dot_product_attention(query, key, value)
            x = x + layer["out"](attended)
            x = x + layer["down"](nn.functional.gelu(layer["up"](layer["norm2"](x))))
        return self.head(x.mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(8, 24)),
    "transformer": (TinyTransformer, lambda: torch.randint(50, (4, 6))),
    "wrn": (lambda: WideResNet(10, 1), lambda: torch.randn(4, 3, 8, 8)),
}


def model_and_batch(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of ``MODELS`` with a batch and its labels, always the same."""
    make_model, make_batch = MODELS[name]
    torch.manual_seed(0)
    model, batch = make_model(), make_batch()
    return model, batch, torch.randint(10, batch.shape[:1])


def random_positions(model: nn.Module, sparsity: float = 0.8, seed: int = 0) -> dict[str, Tensor]:
    """Positions in the weights of all linear and convolution layers, in random order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            numel = module.weight.numel()
            count = max(1, round((1 - sparsity) * numel))
            chosen[f"{path}.weight".lstrip(".")] = torch.randperm(numel, generator=generator)[:count]
    return chosen


def mask_of(positions: Tensor, like: Tensor) -> Tensor:
    """1 at the positions, 0 elsewhere."""
    return torch.zeros_like(like).view(-1).index_fill_(0, positions, 1).view_as(like)


class MaskedTwin:
    """A dense model whose weights and gradients are multiplied by masks."""

    def __init__(self, model: nn.Module, positions: Mapping[str, Tensor]) -> None:
        self.model = copy.deepcopy(model)
        parameters = dict(self.model.named_parameters())
        self.weights = {name: parameters[name] for name in positions}
        self.masks = {name: mask_of(chosen, parameters[name].detach()) for name, chosen in positions.items()}
        self.apply_masks()
        for name, weight in self.weights.items():
            weight.register_hook(lambda gradient, name=name: gradient * self.masks[name])

    @torch.no_grad()
    def apply_masks(self) -> None:
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])


def train(
    model: nn.Module,
    batch: Tensor,
    labels: Tensor,
    optimizer: Optimizer,
    num_steps: int,
    after_step: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Some steps on one batch; the losses."""
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


def assert_equal_states(sparse: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    """Two dense state_dicts are equal to the bit."""
    assert sparse.keys() == dense.keys()
    for name, value in dense.items():
        assert torch.equal(sparse[name], value), name
