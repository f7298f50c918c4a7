"""What `benchmarks/planning.py` plans for: modules with a batch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[pl.LightningModule, Any]


class Step(pl.LightningModule):
    """A network with its loss and its optimizer.

    Args:
        net: the network.
        loss: of the network and a batch.
        optimizer: of the parameters.
        **options: of the optimizer.
    """

    def __init__(
        self, net: nn.Module, loss: Callable[..., Any], optimizer: Callable[..., Any], **options: Any
    ) -> None:
        super().__init__()
        self.net, self._loss, self._optimizer, self._options = net, loss, optimizer, options

    def training_step(self, batch: Any, index: int) -> Any:
        """The loss."""
        return self._loss(self.net, *batch)

    def configure_optimizers(self) -> Any:
        """As it was given."""
        return self._optimizer(self.parameters(), **self._options)


def _classify(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(inputs), labels)


def _next_token(net: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def wide_resnet() -> Made:
    """WRN-28-2 on 100 pictures of CIFAR-10, as its recipe trains it."""
    from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet

    net = WideResNet(depth=28, widen_factor=2, num_classes=10)
    batch = torch.randn(100, 3, 32, 32), torch.randint(0, 10, (100,))
    return Step(
        net, _classify, torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    ), batch


class LanguageModel(nn.Module):
    """A decoder of ``torch.nn``'s layers."""

    def __init__(self, width: int, num_layers: int, num_words: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(num_words, width)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_words)

    def forward(self, tokens: Tensor) -> Any:
        """Scores of the next words."""
        return self.head(self.encoder(self.embed(tokens)))


def language_model(width: int, num_layers: int, num_words: int, shape: tuple[int, int]) -> Made:
    """A language model on random tokens."""
    net = LanguageModel(width, num_layers, num_words)
    return Step(net, _next_token, torch.optim.AdamW), (torch.randint(num_words, shape),)


def layers() -> Made:
    """Eight small blocks."""
    blocks = (nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128)) for _ in range(8))
    batch = torch.randn(256, 128), torch.randint(0, 128, (256,))
    return Step(nn.Sequential(*blocks), _classify, torch.optim.SGD, lr=0.1), batch


class UNet(nn.Module):
    """A U-Net of four levels with batch normalisation, 1.9 M parameters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(_twice(a, b) for a, b in zip([3, *widths], widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.up = nn.ModuleList(_twice(a, b) for a, b in pairs)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Any:
        """Scores of each pixel."""
        kept = []
        for index, level in enumerate(self.down):
            x = level(x if index == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for grow, level, beside in zip(self.grow, self.up, kept[-2::-1], strict=True):
            x = level(torch.cat([grow(x), beside], 1))
        return self.out(x)


def _twice(inputs: int, outputs: int) -> nn.Module:
    parts: list[nn.Module] = []
    for channels in (inputs, outputs):
        parts += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*parts)


def unet() -> Made:
    """A U-Net on 16 pictures of 96 x 96."""
    batch = torch.randn(16, 3, 96, 96), torch.randint(2, (16, 96, 96))
    return Step(UNet(), _classify, torch.optim.AdamW), batch


def gpt2() -> Made:
    """GPT-2 small of `transformers`, 4 rows of 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(loss_type="ForCausalLMLoss"))

    def loss(net: Any, tokens: Tensor) -> Tensor:
        return net(input_ids=tokens, labels=tokens).loss

    return Step(net, loss, torch.optim.AdamW), (torch.randint(50_000, (4, 128)),)


def vit() -> Made:
    """ViT-B/16 of `transformers`, 8 pictures of 224 x 224."""
    from transformers import ViTConfig, ViTForImageClassification

    def loss(net: Any, pictures: Tensor, labels: Tensor) -> Tensor:
        return net(pixel_values=pictures, labels=labels).loss

    net = ViTForImageClassification(ViTConfig())
    return Step(net, loss, torch.optim.AdamW), (torch.randn(8, 3, 224, 224), torch.randint(2, (8,)))


class DynamicConv(nn.Module):
    """A layer whose convolution's kernel is predicted at each place, and a feed-forward part."""

    def __init__(self, width: int, num_heads: int, kernel: int) -> None:
        super().__init__()
        self.num_heads, self.kernel = num_heads, kernel
        self.norm, self.inside = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.weigh, self.outside = nn.Linear(width, num_heads * kernel), nn.Linear(width, width)
        self.forth = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """As long as before."""
        rows, length, width = x.shape
        inside = F.glu(self.inside(self.norm(x)))
        weights = self.weigh(inside).view(rows, length, self.num_heads, 1, self.kernel).softmax(-1)
        places = F.pad(inside, (0, 0, self.kernel - 1, 0)).unfold(1, self.kernel, 1)
        places = places.reshape(rows, length, self.num_heads, width // self.num_heads, self.kernel)
        mixed = (places * F.dropout(weights, 0.1, self.training)).sum(-1).view(rows, length, width)
        x = x + F.dropout(self.outside(mixed), 0.3, self.training)
        return x + self.forth(x)


class DynamicConvModel(nn.Module):
    """A language model of dynamic convolutions."""

    def __init__(self, width: int = 256, num_layers: int = 6, num_words: int = 6000) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(num_words, width), nn.Linear(width, num_words, bias=False)
        self.layers = nn.ModuleList(DynamicConv(width, 4, 7) for _ in range(num_layers))

    def forward(self, tokens: Tensor) -> Any:
        """Scores of the next words."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def dynamic_conv() -> Made:
    """Dynamic convolutions on 32 rows of 48 tokens, with dropout."""
    return Step(DynamicConvModel(), _next_token, torch.optim.Adam), (torch.randint(6000, (32, 49)),)


class GAN(pl.LightningModule):
    """A generator and a discriminator of convolutions, stepped by hand."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(64, 4 * width * 64),
            nn.Unflatten(1, (4 * width, 8, 8)),
            *_grown(4 * width, 2 * width),
            *_grown(2 * width, width),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Tanh(),
        )
        self.judge = nn.Sequential(
            *_shrunk(3, width),
            *_shrunk(width, 2 * width),
            *_shrunk(2 * width, 4 * width),
            nn.Flatten(),
            nn.Linear(4 * width * 16, 1),
        )

    def training_step(self, batch: Any, index: int) -> None:
        """A step of each."""
        (real,) = batch
        of_generator, of_judge = self.optimizers()
        made = self.generator(torch.randn(len(real), 64))
        self.manual_backward(
            F.softplus(-self.judge(real)).mean() + F.softplus(self.judge(made.detach())).mean()
        )
        of_judge.step()
        of_judge.zero_grad()
        self.manual_backward(F.softplus(-self.judge(made)).mean())
        of_generator.step()
        of_generator.zero_grad()
        of_judge.zero_grad()

    def configure_optimizers(self) -> Any:
        """One for each."""
        return [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.99)) for net in (self.generator, self.judge)]


def _grown(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(8, outputs), nn.ReLU()]


def _shrunk(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]


def gan() -> Made:
    """A GAN on 64 pictures of 32 x 32."""
    return GAN(), (torch.randn(64, 3, 32, 32),)


#: By name.
MODELS: dict[str, Callable[[], Made]] = {
    "WRN-28-2, batch 100": wide_resnet,
    "GPT 4.8 M, 32 x 128": lambda: language_model(256, 6, 256, (32, 129)),
    "U-Net 1.9 M, 16 x 96 x 96": unet,
    "DynamicConv, 32 x 48": dynamic_conv,
    "GAN, 64 x 32 x 32": gan,
    "GPT-2 small, 4 x 128": gpt2,
    "ViT-B/16, batch 8": vit,
    "language model 0.9 M, 16 x 64": lambda: language_model(128, 4, 500, (16, 65)),
    "chain of layers, batch 256": layers,
}
