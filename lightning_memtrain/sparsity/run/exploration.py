"""How much of a layer was ever in use."""

from __future__ import annotations

import torch
from torch import Tensor


class ExploredPositions:
    """Which positions of a layer have ever been active, a bit for each, in the memory of the host.

    Args:
        numel: positions of the layer.

    Example:
        >>> explored = ExploredPositions(10)
        >>> explored.add(torch.tensor([0, 3])), explored.add(torch.tensor([3, 9]))
        (None, None)
        >>> explored.count
        3

    References:
        Liu et al., Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
        Training, ICML 2021, arXiv:2102.02887.
    """

    def __init__(self, numel: int) -> None:
        self.bits = torch.zeros(-(-numel // 8), dtype=torch.uint8)

    def add(self, positions: Tensor) -> None:
        """Mark positions as active.

        Args:
            positions: int64 of one axis, each once.
        """
        positions = positions.cpu()
        one = torch.bitwise_left_shift(torch.ones_like(positions), positions & 7).to(torch.uint8)
        # Bits of one pattern differ, so their sum is their union.
        self.bits |= torch.zeros_like(self.bits).index_add_(0, positions >> 3, one)

    @property
    def count(self) -> int:
        """How many positions were ever active."""
        return sum(int((self.bits >> bit & 1).sum(dtype=torch.int64)) for bit in range(8))
