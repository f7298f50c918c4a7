"""Sparse layers, seen as weights to choose and to move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Storage = Literal["auto", "bitmask", "int32", "block16"]


class SparseWeight:
    """One sparse layer."""

    name: str

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        raise NotImplementedError

    @property
    def numel(self) -> int:
        """Of the dense weight."""
        raise NotImplementedError

    @property
    def nnz(self) -> int:
        """How many are stored."""
        raise NotImplementedError

    @property
    def values(self) -> nn.Parameter:
        """``(nnz,)``, by ascending flat position."""
        raise NotImplementedError

    def positions(self) -> Tensor:
        """Int64 ``(nnz,)``, ascending flat positions, on the device of the values."""
        raise NotImplementedError

    def replace(self, kept: Tensor, grown: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Drop and grow: ``kept`` is bool ``(nnz,)``, ``grown`` int64, ascending and disjoint from the kept."""
        raise NotImplementedError


def sparsify_(
    module: nn.Module,
    positions: Mapping[str, Tensor],
    *,
    storage: Storage = "auto",
    chunk_bytes: int | None = None,
) -> dict[str, SparseWeight]:
    """In place: name of a dense weight -> flat positions that stay."""
    raise NotImplementedError


def sparse_weights(module: nn.Module) -> dict[str, SparseWeight]:
    """By name, in module order."""
    raise NotImplementedError


@dataclass(frozen=True)
class Candidates:
    """The largest gradients where there is no weight: int64 positions, float32 gradients."""

    positions: Tensor
    gradients: Tensor


class CandidateWatch:
    """Ends with :meth:`close` or its ``with`` block."""

    def __enter__(self) -> CandidateWatch:
        raise NotImplementedError

    def __exit__(self, *exc_info: object) -> None:
        raise NotImplementedError

    def candidates(self, name: str) -> Candidates:
        """Of one weight."""
        raise NotImplementedError

    def close(self) -> None:
        """End."""
        raise NotImplementedError


def watch_candidates(
    weights: Mapping[str, SparseWeight], num_candidates: Mapping[str, int]
) -> CandidateWatch:
    """While on, each backward reduces the dense gradient to so many candidates by weight."""
    raise NotImplementedError


def export_dense(module: nn.Module) -> dict[str, Tensor]:
    """A plain state_dict of the original model class."""
    raise NotImplementedError
