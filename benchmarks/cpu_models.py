"""Models of `transformers` and `torch.nn` that are small enough to train on a CPU, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

Made = tuple[pl.LightningModule, Any]


class Trained(pl.LightningModule):
    """A network with its loss and its optimizer.

    Args:
        net: the network.
        loss: of the network and a batch.
        optimizer: of the parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss, which is logged."""
        loss = self.loss(self.net, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """The given one."""
        return self.optimizer(self.parameters())


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _tokens(rows: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (rows, length))


def _language(net: Any, tokens: Tensor) -> Tensor:
    return net(input_ids=tokens, labels=tokens).loss


def _pictures(net: Any, batch: Any) -> Tensor:
    return net(pixel_values=batch[0], labels=batch[1]).loss


def _classes(net: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(net(batch[0]), batch[1])


def _next_words(net: Any, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    return Trained(LlamaForCausalLM(config), _language), _tokens(1, 1024, 1000)


def gpt2(rows: int = 2, length: int = 256, **sizes: Any) -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = sizes or {"n_layer": 4, "n_embd": 512, "n_head": 8}
    config = GPT2Config(loss_type="ForCausalLMLoss", **sizes)
    return Trained(GPT2LMHeadModel(config), _language), _tokens(rows, length, 50_000)


def bert() -> Made:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, vocab_size=10_000
    )
    return Trained(BertForMaskedLM(config), _language), _tokens(4, 128, 10_000)


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        decoder_start_token_id=0, d_model=256, d_ff=1024, num_layers=3, num_heads=4, vocab_size=8000
    )
    return Trained(T5ForConditionalGeneration(config), _language), _tokens(4, 128, 8000)


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768)
    return Trained(ViTForImageClassification(config), _pictures), _labelled(8, 224)


def mixtral() -> Made:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=4000,
    )
    return Trained(MixtralForCausalLM(config), _language), _tokens(2, 256, 4000)


def resnet() -> Made:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512])
    return Trained(ResNetForImageClassification(config), _pictures, _momentum), _labelled(8, 160)


def whisper() -> Made:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=256,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        vocab_size=4000,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )

    def loss(net: Any, batch: Any) -> Tensor:
        return net(input_features=batch[0], labels=batch[1]).loss

    return Trained(WhisperForConditionalGeneration(config), loss), (
        torch.randn(2, 80, 3000),
        _tokens(2, 64, 4000),
    )


def lstm() -> Made:
    return Trained(_Recurrent(nn.LSTM), _next_words), _tokens(16, 64, 4000)


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(4000, 256), kind(256, 512, 2, batch_first=True)
        self.out = nn.Linear(512, 4000)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layers(self.words(tokens))[0])


def transformer() -> Made:
    return Trained(_Translation(), _next_words), _tokens(8, 128, 4000)


class _Translation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(4000, 256), nn.Linear(256, 4000)
        self.layers = nn.Transformer(256, 8, 2, 2, 1024, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        words, mask = self.words(tokens), nn.Transformer.generate_square_subsequent_mask(tokens.size(1))
        return self.out(self.layers(words, words, tgt_mask=mask))


def unet() -> Made:
    batch = torch.randn(4, 3, 128, 128), torch.randint(2, (4, 128, 128))
    return Trained(_UNet(), _classes), batch


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.lower, self.bottom = _twice(3, 32), _twice(32, 64), _twice(64, 128)
        self.up, self.upper = nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)
        self.left, self.right, self.out = _twice(128, 64), _twice(64, 32), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        second = self.lower(functional.max_pool2d(first, 2))
        third = self.up(self.bottom(functional.max_pool2d(second, 2)))
        fourth = self.upper(self.left(torch.cat([third, second], 1)))
        return self.out(self.right(torch.cat([fourth, first], 1)))


def _twice(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def wide_resnet() -> Made:
    from benchmarks.models import wide_resnet_step

    net = wide_resnet_step("cpu", 1).model
    return Trained(net, _classes, _momentum), (torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))


def dlrm() -> Made:
    batch = torch.randn(4096, 13), [_tokens(4096, 8, 50_000) for _ in range(4)], torch.rand(4096).round()

    def loss(net: Any, batch: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(net(batch)[:, 0], batch[2])

    return Trained(_Recommendation(), loss, lambda parameters: torch.optim.SGD(parameters, 0.1)), batch


class _Recommendation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50_000, 32, mode="sum", sparse=True) for _ in range(4))
        self.dense = nn.Sequential(nn.Linear(13, 128), nn.ReLU(), nn.Linear(128, 32))
        self.top = nn.Sequential(nn.Linear(160, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, batch: Any) -> Tensor:
        bags = [table(indices) for table, indices in zip(self.tables, batch[1], strict=True)]
        return self.top(torch.cat([self.dense(batch[0]), *bags], 1))


def bags() -> Made:
    """A table alone, whose rows come up again and again, with an optimizer of its own kind."""
    net = nn.EmbeddingBag(100_000, 64, mode="mean", sparse=True)
    indices = torch.randint(20_000, (4096, 16))
    return Trained(net, lambda net, batch: net(batch).square().mean(), torch.optim.SparseAdam), indices


def layers() -> Made:
    net = nn.Sequential(
        nn.Linear(784, 2048),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(2048, 2048),
        nn.LayerNorm(2048),
        nn.Linear(2048, 10),
    )
    return Trained(net, _classes, torch.optim.Adafactor), (torch.randn(2048, 784), torch.randint(10, (2048,)))


def _labelled(rows: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, size, size), torch.randint(2, (rows,))


#: By name: what makes model and batch, and the precision to train in.
MODELS: dict[str, tuple[Callable[[], Made], Any]] = {
    "Llama, 2 layers, 1 x 1024": (llama, "32-true"),
    "GPT-2, 4 layers, 2 x 256": (gpt2, "32-true"),
    "BERT, 4 layers, 4 x 128, bf16 autocast": (bert, "bf16-mixed"),
    "T5, 3 + 3 layers, 4 x 128": (t5, "32-true"),
    "ViT, 4 layers, 8 pictures of 224": (vit, "32-true"),
    "Mixtral, 2 layers, 4 experts, 2 x 256": (mixtral, "32-true"),
    "ResNet, 8 blocks, 8 pictures of 160": (resnet, "32-true"),
    "Whisper, 2 + 2 layers, 2 x 30 s": (whisper, "32-true"),
    "LSTM, 2 layers of 512, 16 x 64": (lstm, "32-true"),
    "nn.Transformer, 2 + 2 layers, 8 x 128, bf16 autocast": (transformer, "bf16-mixed"),
    "U-Net, 4 pictures of 128": (unet, "32-true"),
    "WRN-28-2, 16 pictures of 32": (wide_resnet, "32-true"),
    "EmbeddingBag x 4, sparse gradients, 4,096 rows": (dlrm, "32-true"),
    "EmbeddingBag, SparseAdam, 4,096 rows": (bags, "32-true"),
    "Linear x 3, Adafactor, 2,048 rows": (layers, "32-true"),
}
