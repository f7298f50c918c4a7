"""Which weights of a layer go."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView, MethodState, UpdateTime
from lightning_memtrain.sparsity.methods.value_schedules import Schedule
from lightning_memtrain.sparsity.radix_select import are_largest, keys_of


def all_but_smallest(values: Tensor, count: int) -> Tensor:
    """Which are left without the ``count`` smallest magnitudes; of equal ones the first goes first.

    Args:
        values: floating point ``(nnz,)``, of one layer.
        count: how many to drop, at most all.

    Returns:
        Bool ``(nnz,)``, ``True`` for those that stay.

    Example:
        >>> import torch
        >>> all_but_smallest(torch.tensor([0.3, -0.1, 0.1, 2.0]), count=1)
        tensor([ True, False,  True,  True])
    """
    return are_largest(keys_of(values), values.numel() - count)


class DropRule(ABC):
    """Says which weights go."""

    @abstractmethod
    def kept(self, layer: LayerView, now: UpdateTime, state: MethodState) -> Tensor:
        """Choose which weights of a layer stay.

        Args:
            layer: the layer.
            now: when.
            state: of the method.

        Returns:
            Bool ``(nnz,)``, ``True`` for each weight that stays.
        """


@dataclass(frozen=True)
class DropFraction(DropRule):
    r"""Drops the :math:`\lfloor f(t)\, k \rfloor` smallest magnitudes of the :math:`k` weights of a layer.

    Args:
        fraction: :math:`f`, in ``[0, 1)``.
    """

    fraction: Schedule

    def num_dropped(self, nnz: int, now: UpdateTime) -> int:
        """How many weights of a layer go.

        Args:
            nnz: weights that the layer stores.
            now: when.

        Returns:
            Fewer than ``nnz``.
        """
        return math.floor(self.fraction.value(now.elapsed, now.total) * nnz)

    def kept(self, layer: LayerView, now: UpdateTime, state: MethodState) -> Tensor:
        """All but the smallest stay."""
        return all_but_smallest(layer.values, self.num_dropped(layer.nnz, now))


@dataclass(frozen=True)
class DropBelowThreshold(DropRule):
    """Drops what is smaller than the state's ``threshold``; a layer that would lose all keeps its largest."""

    def kept(self, layer: LayerView, now: UpdateTime, state: MethodState) -> Tensor:
        """All that reach the threshold stay."""
        kept = layer.values.abs() >= state["threshold"]
        if not kept.any():
            kept[layer.values.abs().argmax()] = True
        return kept
