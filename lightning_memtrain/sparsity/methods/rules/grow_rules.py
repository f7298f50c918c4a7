"""Where weights grow in a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerChange, LayerView, UpdateTime
from lightning_memtrain.sparsity.methods.rules.random_positions import sample_free_positions
from lightning_memtrain.sparsity.radix_select import keys_of, level_of_largest


class GrowRule(ABC):
    """Says where weights grow."""

    @abstractmethod
    def change(self, layer: LayerView, kept: Tensor, count: int, now: UpdateTime) -> LayerChange:
        """Choose where weights grow in a layer.

        Args:
            layer: the layer.
            kept: bool ``(nnz,)``, what a drop rule said.
            count: how many weights to add to those that are kept.
            now: when.

        Returns:
            What becomes of the layer.
        """


@dataclass(frozen=True)
class GrowRandom(GrowRule):
    """Grows uniformly among inactive positions.

    Args:
        may_return: whether those that were dropped just now count as inactive. If there are not enough
            others, they do.
    """

    may_return: bool = True

    def change(self, layer: LayerView, kept: Tensor, count: int, now: UpdateTime) -> LayerChange:
        """Draw positions at random."""
        enough = count <= layer.numel - layer.nnz
        taken = layer.positions if enough and not self.may_return else layer.positions[kept]
        return LayerChange(kept, sample_free_positions(layer.numel, taken, count, now.generator(layer.name)))


@dataclass(frozen=True)
class GrowByGradient(GrowRule):
    """Grows where the gradient is largest, among all positions that are not kept.

    A weight that was dropped just now and has one of the largest gradients stays as it is, with its value and
    optimizer state. An infinite gradient, as a scaled loss may give, is the largest; where it is not a number
    nothing grows.
    """

    def change(self, layer: LayerView, kept: Tensor, count: int, now: UpdateTime) -> LayerChange:
        """Choose the largest; of equal ones the first position."""
        if layer.candidate_positions is None or layer.candidate_gradients is None:
            # A layer without room: what was dropped can only return.
            return LayerChange(torch.ones_like(kept), torch.empty(0, dtype=torch.int64, device=kept.device))
        candidates, gradients = layer.candidate_positions, layer.candidate_gradients
        if gradients.isnan().any():
            is_number = ~gradients.isnan()
            candidates, gradients = candidates[is_number], gradients[is_number]
        dropped = (~kept).nonzero().view(-1)
        # Those without a gradient of their own have the key -1: they come last, as in a layer without any.
        own_keys = torch.full_like(dropped, -1, dtype=torch.int32)
        if layer.gradients is not None:
            own = layer.gradients.index_select(0, dropped).to(gradients.dtype)
            own_keys = keys_of(own).masked_fill_(own.isnan(), -1)
        keys = torch.cat([keys_of(gradients), own_keys])
        best = _best(keys, count, candidates, lambda: layer.positions[dropped])
        kept = kept.clone()
        kept[dropped[best[len(candidates) :]]] = True
        return LayerChange(kept, candidates[best[: len(candidates)]])


def _best(keys: Tensor, count: int, candidates: Tensor, others: Callable[[], Tensor]) -> Tensor:
    """Which keys are the largest; of equal ones those with the first positions, candidates' or others'."""
    if count >= len(keys):
        return torch.ones_like(keys, dtype=torch.bool)
    if not count:
        return torch.zeros_like(keys, dtype=torch.bool)
    level = level_of_largest(lambda: [keys + 1], count)
    best, equal = keys > level.key - 1, (keys == level.key - 1).nonzero().view(-1)
    if level.num_equal < len(equal):
        positions = torch.cat([candidates, others()])[equal]
        equal = equal[positions.argsort()[: level.num_equal]]
    best[equal] = True
    return best
