"""What an update sees of a layer, and what it does to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memtrain.core.arguments.value_checks import check_counts


@dataclass(frozen=True)
class LayerView:
    """What an update sees of a sparse layer.

    Args:
        name: its path in the model.
        shape: of the dense weight.
        decode: makes the flat positions of its nonzero weights, int64, ascending.
        values: their values ``(nnz,)``, in that order.
        candidate_positions: int64, inactive positions with the largest gradients, as far as a rule asked for
            them.
        candidate_gradients: float32, their gradients.
        gradients: ``(nnz,)``, those of the values, in their order and scaled as those of the candidates.
    """

    name: str
    shape: Sequence[int]
    decode: Callable[[], Tensor]
    values: Tensor
    candidate_positions: Tensor | None = None
    candidate_gradients: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def numel(self) -> int:
        """Entries of the dense weight, zeros included."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Number of weights that are stored."""
        return self.values.numel()

    @property
    def positions(self) -> Tensor:
        """Int64 ``(nnz,)``, ascending; made at each look, so that those of one layer exist at a time."""
        return self.decode()


@dataclass(frozen=True)
class UpdateTime:
    """When an update is, as rules and schedules count the time.

    Args:
        step: optimizer steps completed.
        elapsed: steps since schedules began.
        total: steps from there to where schedules end; 0 if there is no end.
        seed: of the run.
    """

    step: int
    elapsed: int
    total: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts("UpdateTime", 0, step=self.step, total=self.total)
        check_counts("UpdateTime", None, elapsed=self.elapsed, seed=self.seed)

    def generator(self, layer: str) -> torch.Generator:
        """Random numbers that depend on seed, step and layer only: the same on every rank, and after resume.

        Args:
            layer: its name.

        Returns:
            A generator on the CPU.
        """
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{layer}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class LayerChange:
    """What an update does to one layer.

    Args:
        kept: bool ``(nnz,)``: whether a weight that is stored stays, with its value and optimizer state.
        grown: int64, ascending flat positions that start at 0; some may have been dropped just now.
    """

    kept: Tensor
    grown: Tensor

    @property
    def num_dropped(self) -> int:
        """How many weights go."""
        return self.kept.numel() - int(self.kept.sum())


MethodState = Mapping[str, float]
"""What a method keeps between updates, e.g. ``{"threshold": 0.001}``."""
