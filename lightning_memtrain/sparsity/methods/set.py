"""Sparse evolutionary training: drops by magnitude, grows at random."""

# Without postponed annotations, as its base.
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_memtrain.sparsity.methods.distributions import (
    Distribution,
    Uniform,
)
from lightning_memtrain.sparsity.methods.drop_and_grow import DropAndGrow
from lightning_memtrain.sparsity.methods.rules.drop_rules import (
    DropFraction,
)
from lightning_memtrain.sparsity.methods.rules.grow_rules import GrowRandom, GrowRule
from lightning_memtrain.sparsity.methods.rules.layer_updates import UpdateTime
from lightning_memtrain.sparsity.methods.sparse_method import Sparsity, check_sparsities
from lightning_memtrain.sparsity.methods.value_schedules import CosineSchedule, Schedule, to_schedule


@dataclass(frozen=True)
class SET(DropAndGrow):
    r"""Sparse evolutionary training: drops the smallest weights, and grows as many at random.

    At step :math:`t`, each layer of :math:`k` weights drops its :math:`\lfloor f(t) k \rfloor` smallest
    magnitudes and grows as many, uniformly among all positions that are inactive then.

    Args:
        sparsity: fraction of zeros, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
        drop: fraction :math:`f` of a layer's weights that an update drops, a number or a schedule.
        distribution: spreads the sparsity over layers.

    Raises:
        ArgumentError: if an argument is out of its range.

    Example:
        >>> now = UpdateTime(step=1, elapsed=1, total=10)
        >>> SET(0.9, drop=CosineSchedule(0.3)).num_candidates({"fc": 100}, now)
        {}

    References:
        Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity,
        Nature Communications 2018, arXiv:1707.04780.
    """

    sparsity: Sparsity
    drop: Schedule | float = field(default_factory=lambda: CosineSchedule(0.3))
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_sparsities(self, self.sparsity)
        object.__setattr__(self, "drop", to_schedule(self.drop, f"{type(self).__name__}(drop)"))

    @property
    def needs_end(self) -> bool:
        """Whether the schedule of the fraction does."""
        return self._drop.needs_end

    @property
    def _drop(self) -> Schedule:
        assert isinstance(self.drop, Schedule)
        return self.drop

    @property
    def drop_rule(self) -> DropFraction:
        """Drops the smallest magnitudes."""
        return DropFraction(self._drop)

    @property
    def grow_rule(self) -> GrowRule:
        """Grows at random."""
        return GrowRandom()

    def has_effect(self, nnz: Mapping[str, int], now: UpdateTime) -> bool:
        """Unless all fractions of layers are less than one weight."""
        return any(self.drop_rule.num_dropped(count, now) for count in nnz.values())
