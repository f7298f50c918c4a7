"""Dynamic sparse reparameterization: weights move between layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_numbers
from lightning_memtrain.sparsity.methods.distributions import Distribution, Uniform
from lightning_memtrain.sparsity.methods.drop_and_grow import DropAndGrow
from lightning_memtrain.sparsity.methods.rules.drop_rules import (
    DropBelowThreshold,
    DropRule,
)
from lightning_memtrain.sparsity.methods.rules.grow_rules import GrowRandom, GrowRule
from lightning_memtrain.sparsity.methods.rules.layer_updates import MethodState
from lightning_memtrain.sparsity.methods.rules.reallocation import AcrossLayers, Reallocation
from lightning_memtrain.sparsity.methods.sparse_method import Sparsity, check_sparsities
from lightning_memtrain.sparsity.methods.update_schedules import UpdateEvery, UpdateSchedule


@dataclass(frozen=True)
class DSR(DropAndGrow):
    r"""Drops what is below one threshold for all layers, and moves weights to the layers that keep most.

    An update drops all :math:`K_l` weights of layer :math:`l` with :math:`|w| < H`, which leaves
    :math:`R_l`. It grows :math:`\sum_i K_i \cdot R_l / \sum_i R_i` in each layer, uniformly among positions
    that were inactive, so that the total stays the same, exactly. Then :math:`H` is halved if more than
    :math:`(1 + \delta) N` were dropped, and doubled if fewer than :math:`(1 - \delta) N`.

    Args:
        sparsity: fraction of zeros at the start, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
            The total stays.
        reallocate: weights to drop per update, :math:`N`: a whole number, or a float as a fraction of all
            nonzero weights. The authors drop 20,000 on WRN-28-2, which is 0.14 at a sparsity of 0.9.
        threshold: :math:`H` at first.
        tolerance: :math:`\delta`, in ``[0, 1)``.
        distribution: spreads the sparsity at the start.

    Raises:
        ArgumentError: if an argument is out of its range; at the start of the run, if
            ``reallocate`` is more than all weights.

    Example:
        >>> DSR(0.9).initial_state(nnz=100)
        {'threshold': 0.001}

    References:
        Mostafa and Wang, Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
        Reparameterization, ICML 2019, arXiv:1902.05967.
    """

    sparsity: Sparsity
    reallocate: int | float = 0.14
    threshold: float = 1e-3
    tolerance: float = 0.1
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_sparsities(self, self.sparsity)
        name, number = type(self).__name__, self.reallocate
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not number > 0 or (isinstance(number, float) and number >= 1):
            raise ArgumentError(
                f"`{name}(reallocate)` must be a number of weights, at least 1, or a fraction of all nonzero "
                f"weights as a float in (0, 1), but got reallocate={number!r}. Use e.g. 0.14 or 20000."
            )
        expected, cure = "greater than 0 and finite", "Use e.g. 1e-3; it adapts itself."
        check_numbers(name, expected, lambda x: x > 0, cure, threshold=self.threshold)
        expected = "a fraction in [0, 1)"
        check_numbers(name, expected, lambda x: 0 <= x < 1, "Use e.g. 0.1.", tolerance=self.tolerance)

    @property
    def default_update(self) -> UpdateSchedule:
        """Every 100 steps, nearly to the end, as the authors do."""
        return UpdateEvery(100, start=0, stop=0.95)

    @property
    def changes_nnz(self) -> bool:
        """The number of weights of a layer changes, since weights move between layers."""
        return True

    @property
    def drop_rule(self) -> DropRule:
        """Drops by one threshold for all layers."""
        return DropBelowThreshold()

    @property
    def grow_rule(self) -> GrowRule:
        """Grows at random, where nothing was dropped just now."""
        return GrowRandom(may_return=False)

    @property
    def reallocation(self) -> Reallocation:
        """Divides what was dropped among all layers."""
        return AcrossLayers()

    def initial_state(self, nnz: int) -> dict[str, float]:
        """The first threshold; refuses to reallocate more than there is."""
        if self.reallocate > nnz:
            raise ArgumentError(
                f"`{type(self).__name__}(reallocate)` must be at most the number of nonzero weights, {nnz} "
                f"here, but got reallocate={self.reallocate}. Give a fraction of them, e.g. 0.14."
            )
        return {"threshold": self.threshold}

    def next_state(self, state: MethodState, num_dropped: int, nnz: int) -> MethodState:
        """Halve or double the threshold if it dropped too many or too few."""
        wanted = self.reallocate * nnz if isinstance(self.reallocate, float) else self.reallocate
        threshold = state["threshold"]
        if num_dropped > (1 + self.tolerance) * wanted:
            threshold /= 2
        elif num_dropped < (1 - self.tolerance) * wanted:
            threshold *= 2
        return {"threshold": threshold}
