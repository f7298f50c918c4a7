"""What an update does, and what it has still to do where an error or an interrupt has ended it.

Each layer moves at once or not at all. An update of several is finished later: with the same changes, which
were chosen before the first layer moved, and which a checkpoint holds. So the end is that of an update
without fault, and no second copy of all layers is needed for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerChange, MethodState
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight, assign_all


@dataclass(frozen=True)
class UpdateResult:
    """What one update has dropped and grown.

    Args:
        step: optimizer steps completed.
        num_dropped: weights that went, in all layers.
        num_grown: weights that came.
    """

    step: int
    num_dropped: int
    num_grown: int


@dataclass(frozen=True)
class UnfinishedUpdate:
    """An update whose changes are known.

    Args:
        moved: what it will have done in the end.
        state: of the method, from then on.
        changes: of layers that have not moved yet.
    """

    moved: UpdateResult
    state: MethodState
    changes: dict[str, LayerChange]

    def finish_with(self, weights: Mapping[str, SparseWeight], optimizers: Sequence[Optimizer]) -> None:
        """Move the layers that have not moved yet, each together with the record that it has.

        Args:
            weights: by the names of the changes.
            optimizers: whose state follows.
        """
        for name, change in list(self.changes.items()):
            assignments = weights[name].prepare_replace(change.kept, change.grown, optimizers)
            assign_all([*assignments, partial(self.changes.pop, name, None)])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        moved = self.moved
        return {
            "moved": [moved.step, moved.num_dropped, moved.num_grown],
            "state": dict(self.state),
            "changes": {name: (one.kept.cpu(), one.grown.cpu()) for name, one in self.changes.items()},
        }

    @staticmethod
    def loaded(state: Mapping[str, Any] | None) -> UnfinishedUpdate | None:
        """Read what a checkpoint holds of an update.

        Args:
            state: of :meth:`state_dict`, or ``None``.

        Returns:
            ``None`` for ``None``.
        """
        if state is None:
            return None
        changes = {name: LayerChange(*change) for name, change in state["changes"].items()}
        return UnfinishedUpdate(UpdateResult(*state["moved"]), state["state"], changes)
