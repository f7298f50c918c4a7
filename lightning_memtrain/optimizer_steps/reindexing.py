"""Optimizers whose state is stored in a form of its own, and can still follow weights that move."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class SupportsReindexing(Protocol):
    """An optimizer that moves the state of a parameter's entries by itself.

    Sparse training drops entries of a one-dimensional parameter and grows others. State with one number per
    entry is moved by who drops and grows; state in codes, blocks or factors can only be moved by the
    optimizer that knows them.
    """

    def reindex_state(self, parameter: Tensor, source: Tensor) -> None:
        """Give each entry the state that another one has had; called before ``parameter`` changes its size.

        Puts new tensors in the place of the old ones, and writes into none of these: if memory runs out for
        something else, the old ones come back.

        Args:
            parameter: of one axis; without state, nothing is to be done.
            source: int64, of one axis, one per entry to be: the number of the entry that it was, or -1 if it
                is new and starts as the optimizer wants it.
        """
