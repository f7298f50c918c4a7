"""Layers that take the place of parts of fairseq's models, with the same parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SinusoidalPositions(nn.Module):
    r"""Position :math:`i` as sines and cosines of :math:`i` times geometrically falling frequencies.

    Equal to fairseq's, of which it takes the place: that one asks for shapes in a way that breaks on tensors
    without data, keeps a table of 1,024 positions whatever the length of the sentences, and rounds it with
    the model: in bfloat16 position 200 would be as good as 201. Padding has the zero vector, and does not
    count as a position.

    Args:
        width: of the vectors, even and at least 4.
        padding: index of the padding symbol.

    Example:
        >>> SinusoidalPositions(width=4, padding=1)(torch.tensor([[1, 5, 7]])).shape
        torch.Size([1, 3, 4])
    """

    max_positions = int(1e5)

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.width = width
        self.padding_idx = padding

    def forward(
        self, tokens: Tensor, incremental_state: Any = None, timestep: Any = None, positions: Any = None
    ) -> Tensor:
        """The vectors of the positions of tokens.

        Args:
            tokens: ids, shape ``(batch, length)``.
            incremental_state: whether only the last position is wanted, as in generation.
            timestep: not used.
            positions: not used.

        Returns:
            Shape ``(batch, length, width)``, or ``(batch, 1, width)``; float32.
        """
        batch, length = tokens.shape
        table = self._table(self.padding_idx + 1 + length, tokens.device)
        if incremental_state is not None:
            return table[-1].expand(batch, 1, -1)
        counts = tokens.ne(self.padding_idx).int()
        return F.embedding(counts.cumsum(1) * counts + self.padding_idx, table)

    def _table(self, length: int, device: torch.device) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float, device=device)
        frequencies = torch.exp(steps * -(math.log(10_000) / (half - 1)))
        angles = torch.arange(length, dtype=torch.float, device=device).unsqueeze(1) * frequencies
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        table[self.padding_idx] = 0
        return table


class DeferredProjection(nn.Linear):
    """The projection onto the vocabulary, which can be left to the loss.

    While it is deferred it returns what it is given, and the loss multiplies by its weight chunk by chunk. It
    is a permanent state and no context, because a decoder that is recomputed in backward has to do the same
    as in forward.
    """

    deferred = False

    def forward(self, x: Tensor) -> Tensor:
        """Scores of all words, or ``x`` itself if that is left to the loss."""
        return x if self.deferred else super().forward(x)
