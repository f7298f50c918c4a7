"""A random pattern that never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_memtrain.sparsity.methods.distributions import (
    Distribution,
    Shapes,
    Uniform,
    counts_by_layer,
)
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView, MethodState, UpdateTime
from lightning_memtrain.sparsity.methods.sparse_method import (
    PatternUpdate,
    SparseMethod,
    Sparsity,
    check_sparsities,
)
from lightning_memtrain.sparsity.methods.update_schedules import UpdateSchedule


@dataclass(frozen=True)
class StaticSparse(SparseMethod):
    """Trains a random pattern that never changes.

    Args:
        sparsity: fraction of zeros, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
        distribution: spreads it over layers.

    Raises:
        ArgumentError: if ``sparsity`` is out of its range.

    Example:
        >>> StaticSparse(0.9).counts({"fc": (10, 100)}, overrides={})
        {'fc': 100}
    """

    sparsity: Sparsity
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_sparsities(self, self.sparsity)

    @property
    def default_update(self) -> UpdateSchedule | None:
        """None, since the pattern never changes."""
        return None

    def counts(self, shapes: Shapes, overrides: Mapping[str, float]) -> dict[str, int]:
        """Weights of each layer: what the distribution says."""
        return counts_by_layer(shapes, self.sparsity, self.distribution, overrides)

    def update(self, layers: Mapping[str, LayerView], now: UpdateTime, state: MethodState) -> PatternUpdate:
        """Change nothing."""
        return PatternUpdate({}, state)
