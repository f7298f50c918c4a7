"""What all of dynamic sparse training has in common."""

# Without postponed annotations: for arguments from YAML, those of a base are looked up in its heirs' modules.
from abc import abstractmethod
from collections.abc import Mapping

from lightning_memtrain.sparsity.methods.distributions import (
    Distribution,
    Shapes,
    counts_by_layer,
)
from lightning_memtrain.sparsity.methods.rules.drop_rules import (
    DropRule,
)
from lightning_memtrain.sparsity.methods.rules.grow_rules import GrowRule
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView, MethodState, UpdateTime
from lightning_memtrain.sparsity.methods.rules.reallocation import Reallocation, WithinLayers
from lightning_memtrain.sparsity.methods.sparse_method import PatternUpdate, SparseMethod, Sparsity


class DropAndGrow(SparseMethod):
    """Drops some weights, and grows as many: all of dynamic sparse training is this with other rules."""

    sparsity: Sparsity
    distribution: Distribution

    @property
    @abstractmethod
    def drop_rule(self) -> DropRule:
        """Says which weights of a layer go."""

    @property
    @abstractmethod
    def grow_rule(self) -> GrowRule:
        """Says where weights grow in a layer."""

    @property
    def reallocation(self) -> Reallocation:
        """Says how many weights grow in each layer."""
        return WithinLayers()

    def counts(self, shapes: Shapes, overrides: Mapping[str, float]) -> dict[str, int]:
        """Weights of each layer at the start: what the distribution says."""
        return counts_by_layer(shapes, self.sparsity, self.distribution, overrides)

    def update(self, layers: Mapping[str, LayerView], now: UpdateTime, state: MethodState) -> PatternUpdate:
        """Drop weights in all layers, divide their number among layers, and grow as many."""
        kept = {name: self.drop_rule.kept(layer, now, state) for name, layer in layers.items()}
        num_left = {name: int(stays.sum()) for name, stays in kept.items()}
        num_grown = self.reallocation.num_grown(layers, num_left)
        changes = {
            name: self.grow_rule.change(layer, kept[name], num_grown[name], now)
            for name, layer in layers.items()
            if num_grown[name] or num_left[name] < layer.nnz
        }
        num_dropped = sum(layer.nnz - num_left[name] for name, layer in layers.items())
        return PatternUpdate(
            changes, self.next_state(state, num_dropped, sum(layer.nnz for layer in layers.values()))
        )

    def next_state(self, state: MethodState, num_dropped: int, nnz: int) -> MethodState:
        """What the method keeps after an update.

        Args:
            state: before it.
            num_dropped: weights that its drop rule chose.
            nnz: weights of all layers.

        Returns:
            Names and numbers.
        """
        return state
