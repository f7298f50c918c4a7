"""The decoder that four recordings of a real GPU are of, written from its description.

24 layers of 1,024 with 16 heads, SwiGLU of 4,096, RMSNorm, rotary embedding, a vocabulary of 10,000: 423
million parameters. Linear layers are products by einsum, attention and loss are spelled out, and so is AdamW.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

_VOCABULARY = 10_000


class Linear(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * x).to(dtype)


class Rotary(nn.Module):
    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        frequencies = 10_000.0 ** -(torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(context).float(), frequencies)
        self.register_buffer("waves", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = self.waves[:, : x.shape[-2]]
        turned = cosine * even - sine * odd, sine * even + cosine * odd
        return torch.stack(turned, -1).flatten(-2)


def softmax(x: Tensor) -> Tensor:
    exponentials = torch.exp(x - torch.max(x, dim=-1, keepdim=True)[0])
    return exponentials / torch.sum(exponentials, dim=-1, keepdim=True)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", query, key) / math.sqrt(key.shape[-1])
    scores = torch.where(mask, scores, float("-inf"))
    return torch.einsum("...qk,...kd->...qd", softmax(scores), value)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, rotary: Rotary) -> None:
        super().__init__()
        self.num_heads, self.rotary = num_heads, rotary
        self.query, self.key, self.value, self.output = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        layers = self.query, self.key, self.value
        heads = batch, length, self.num_heads, width // self.num_heads
        query, key, value = (layer(x).view(heads).transpose(1, 2) for layer in layers)
        query, key = self.rotary(query), self.rotary(key)
        place = torch.arange(length, device=x.device)
        causal = place.view(1, 1, -1, 1) >= place.view(1, 1, 1, -1)
        attended = attend(query, key, value, causal.expand(batch, self.num_heads, length, length))
        return self.output(attended.transpose(1, 2).contiguous().view(batch, length, width))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.down, self.up = Linear(width, hidden), Linear(hidden, width), Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(gate * torch.sigmoid(gate) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int, rotary: Rotary) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, num_heads, rotary), SwiGLU(width, hidden)
        self.before_attention, self.before_feed_forward = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.before_attention(x))
        x = x + attended
        fed = self.feed_forward(self.before_feed_forward(x))
        return x + fed


class Decoder(nn.Module):
    def __init__(self, context: int, num_layers: int = 24, width: int = 1024) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(_VOCABULARY, width))
        rotary = Rotary(context, width // 16)
        self.layers = nn.ModuleList(Block(width, 16, 4 * width, rotary) for _ in range(num_layers))
        self.norm, self.head = RMSNorm(width), Linear(width, _VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def log_softmax(x: Tensor) -> Tensor:
    x = x - torch.max(x, dim=-1, keepdim=True)[0]
    return x - torch.log(torch.sum(torch.exp(x), dim=-1, keepdim=True))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    negative = -log_softmax(logits)
    return torch.mean(torch.gather(negative, -1, targets.unsqueeze(-1)))


class AdamW(torch.optim.Optimizer):
    """AdamW, parameter by parameter, whose moments are new tensors at each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update(parameter, parameter.grad.data, **group)

    def _update(
        self, parameter: Tensor, gradient: Tensor, lr: float, betas: Any, weight_decay: float, **_: Any
    ) -> None:
        state, (first, second) = self.state[parameter], betas
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        step = state["step"] + 1
        rate = lr * math.sqrt(1 - second**step) / (1 - first**step)
        parameter.data -= lr * weight_decay * parameter.data
        mean = first * state["mean"] + (1 - first) * gradient
        square = second * state["square"] + (1 - second) * gradient**2
        parameter.data -= rate * mean / (torch.sqrt(square) + 1e-8)
        state["step"], state["mean"], state["square"] = step, mean, square


class DecoderStep(pl.LightningModule):
    """The recorded step: gradients are released first, and autocast, where it is on, ends with the loss."""

    def __init__(self, context: int, *, autocast: bool, num_layers: int = 24) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.autocast = Decoder(context, num_layers), autocast

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        tokens, targets = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model(tokens)
            loss = cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters())


def decoder_batch(context: int) -> tuple[Tensor, Tensor]:
    """Four sequences, and what comes next in them."""
    tokens = torch.randint(_VOCABULARY, (4, context))
    return tokens, tokens.clone()
