"""Training steps of known models, shared by the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_memtrain.recipes.cifar10_wrn28_2.model import PreactivationBlock, WideResNet


@dataclass
class Step:
    """A model with all that one training step needs; call it to run the step."""

    model: nn.Module
    optimizer: Optimizer
    inputs: tuple[torch.Tensor, ...]
    loss: Callable[..., torch.Tensor]
    microbatch_size: int | None = None

    def __call__(self) -> None:
        """Forward, backward, optimizer step, gradients dropped."""
        batch_size = len(self.inputs[0])
        size = self.microbatch_size or batch_size
        for start in range(0, batch_size, size):
            chunk = (tensor[start : start + size] for tensor in self.inputs)
            (self.loss(self.model, *chunk) * (size / batch_size)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def wide_resnet_step(
    device: str, batch_size: int = 100, *, checkpointed: bool = False, microbatch_size: int | None = None
) -> Step:
    """WideResNet-28-2 on CIFAR-10 shapes, as in Sohoni et al. 2019."""
    with torch.device(device):
        model = WideResNet(depth=28, widen_factor=2, num_classes=10)
        inputs = (torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,)))
    if checkpointed:
        checkpoint_blocks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return Step(model, optimizer, inputs, _classify, microbatch_size)


def checkpoint_blocks(model: nn.Module) -> None:
    """Put every residual block of a WideResNet into ``torch.utils.checkpoint``, by hand."""
    for block in model.modules():
        if isinstance(block, PreactivationBlock):
            block.forward = _checkpointed(block.forward)  # type: ignore[method-assign]


def transformer_step(device: str, batch_size: int = 8, *, num_layers: int = 12, width: int = 256) -> Step:
    """A pre-norm transformer language model on sequences of 64 tokens, with AdamW."""
    with torch.device(device):
        model = _LanguageModel(num_layers, width)
        tokens = torch.randint(0, 1000, (batch_size, 65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Step(model, optimizer, (tokens,), _predict_next)


def padded_transformer_step(device: str, batch_size: int = 100) -> Step:
    """A small language model without dropout, on sequences of 8 to 64 tokens and padding (token 0), with SGD.

    The loss is the mean over the tokens that are to be predicted, which are no padding.
    """
    with torch.device(device):
        model = _LanguageModel(num_layers=2, width=64, dropout=0.0)
        tokens = torch.randint(1, 1000, (batch_size, 65))
        num_predicted = torch.randint(8, 65, (batch_size, 1))
        tokens = tokens * (torch.arange(65) <= num_predicted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Step(model, optimizer, (tokens,), _predict_unpadded)


def resnet50_step(device: str, batch_size: int = 8) -> Step:
    """ResNet-50 as configured in `transformers` (which must be installed), on 64x64 images, with SGD."""
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.device(device):
        model = ResNetForImageClassification(ResNetConfig(num_labels=10)).train()
        inputs = (torch.randn(batch_size, 3, 64, 64), torch.randint(0, 10, (batch_size,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Step(model, optimizer, inputs, lambda m, x, y: m(pixel_values=x, labels=y).loss)


def vit_step(device: str, batch_size: int = 8) -> Step:
    """ViT-B/16 as configured in `transformers` (which must be installed), on 224x224 images, with SGD."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device(device):
        model = ViTForImageClassification(ViTConfig(num_labels=10))
        inputs = (torch.randn(batch_size, 3, 224, 224), torch.randint(0, 10, (batch_size,)))
    loss = lambda net, images, labels: F.cross_entropy(net(pixel_values=images).logits, labels)  # noqa: E731
    return Step(model.train(), torch.optim.SGD(model.parameters(), lr=1e-2), inputs, loss)


def bert_step(device: str, batch_size: int = 8, num_tokens: int = 128) -> Step:
    """BERT-base as configured in `transformers` (which must be installed), two classes, with SGD."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device(device):
        model = BertForSequenceClassification(BertConfig(num_labels=2))
        inputs = (
            torch.randint(0, 30_000, (batch_size, num_tokens)),
            torch.randint(0, 2, (batch_size,)),
        )
    loss = lambda net, tokens, labels: F.cross_entropy(net(input_ids=tokens).logits, labels)  # noqa: E731
    return Step(model.train(), torch.optim.SGD(model.parameters(), lr=1e-2), inputs, loss)


def mlp_step(device: str, num_layers: int, width: int = 64, batch_size: int = 256) -> Step:
    """A deep chain of equal blocks: linear layer and ReLU."""
    with torch.device(device):
        blocks = (nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(num_layers))
        model = nn.Sequential(*blocks)
        inputs = (torch.randn(batch_size, width),)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Step(model, optimizer, inputs, lambda net, batch: net(batch).square().mean())


class _LanguageModel(nn.Module):
    def __init__(self, num_layers: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(1000, width)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1000)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.encoder(self.embed(tokens)))


def _classify(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def _predict_next(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _predict_unpadded(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def many_modules_step(device: str, num_modules: int = 5000, width: int = 8, batch_size: int = 4) -> Step:
    """A model of thousands of small modules, Linear and GELU in turn, whose operators take microseconds."""
    with torch.device(device):
        pairs = (nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(num_modules // 3))
        model = nn.Sequential(*pairs)
        inputs = (torch.randn(batch_size, width),)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Step(model, optimizer, inputs, lambda model, batch: model(batch).square().mean())
