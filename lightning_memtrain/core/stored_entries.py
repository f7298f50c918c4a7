"""Layers that store some entries of their weight, as those see them who need not know how."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class StoresEntries(Protocol):
    """A layer without a parameter ``weight``, such as one of sparse training.

    Attributes:
        values: the stored entries ``(nnz,)``, by ascending flat position.
    """

    values: nn.Parameter

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the dense weight."""

    def positions(self) -> Tensor:
        """Int64 ``(nnz,)``: flat positions of the values in the dense weight."""
