"""RigL: grows where the dense gradient is largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_memtrain.sparsity.methods.rules.grow_rules import GrowByGradient, GrowRule
from lightning_memtrain.sparsity.methods.rules.layer_updates import UpdateTime
from lightning_memtrain.sparsity.methods.set import SET


@dataclass(frozen=True)
class RigL(SET):
    r"""Rigging the lottery: :class:`SET` that grows where the gradient is largest.

    The dense gradient is needed in the step before an update only, a layer at a time: backward reduces it to
    the largest entries at once. With gradient accumulation, the first backward chooses twice as many
    candidates, and the later ones add to these only.

    Args:
        sparsity: fraction of zeros, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
        drop: fraction of a layer's weights that an update drops, a number or a schedule.
        distribution: spreads the sparsity over layers.

    Raises:
        ArgumentError: if an argument is out of its range.

    Example:
        >>> RigL(0.9, drop=0.3).num_candidates({"fc": 100}, UpdateTime(step=1, elapsed=1, total=10))
        {'fc': 30}

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134.
    """

    @property
    def grow_rule(self) -> GrowRule:
        """Grows where the gradient is largest."""
        return GrowByGradient()

    def num_candidates(self, nnz: Mapping[str, int], now: UpdateTime) -> dict[str, int]:
        """As many candidates as weights are dropped."""
        numbers = {name: self.drop_rule.num_dropped(count, now) for name, count in nnz.items()}
        return {name: number for name, number in numbers.items() if number}
