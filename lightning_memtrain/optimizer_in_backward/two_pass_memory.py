"""What two backwards over one graph hold beside a single one, told by watching one step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.coordination import dry_run_depth
from lightning_memtrain.core import Category
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.storage_records import StorageRecord, held_at_peak


class TwoPassPeaks(NamedTuple):
    """The highest moment of a step.

    Args:
        two_passes_bytes: as it was run.
        plain_bytes: with one backward, and gradients that live until the optimizer steps.
    """

    two_passes_bytes: int
    plain_bytes: int


class TwoPassMemory:
    """Watches a step whose first backward measures, and whose second one steps.

    Args:
        model: the module that is trained.
        optimizers: the run's; they have their state already.
        batch: that is about to be run.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], batch: Any) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
        self._gradient_bytes = sum(p.nbytes for p in parameters)
        self._ticks: list[int] = []
        self._first = self._second = self._end = 0
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in parameters]  # type: ignore[no-untyped-call]
        self._ledger = MemoryLedger(model, optimizers, batch).__enter__()

    def _note(self, parameter: Tensor) -> None:
        if not dry_run_depth():
            self._ticks.append(self._ledger.tick)

    def first_begins(self) -> None:
        """The forward is over."""
        if not dry_run_depth():
            self._first = self._ledger.tick

    def second_begins(self) -> None:
        """The first backward is over."""
        if not dry_run_depth():
            self._second = self._ledger.tick

    def second_ends(self) -> None:
        """All parameters are stepped."""
        if not dry_run_depth():
            self._end = self._ledger.tick

    def close(self) -> TwoPassPeaks | None:
        """Stop watching.

        Returns:
            What was found; ``None`` if there were no two backwards alike.
        """
        self._ledger.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        num_first = bisect_left(self._ticks, self._second)
        first, second = self._ticks[:num_first], self._ticks[num_first:]
        if not self._end or len(first) != len(second):
            return None
        records = self._ledger.records
        plain = as_one_pass(records, [self._first, *first], [self._second, *second])
        forward_bytes = held_at_peak(records, 0, self._first).total_bytes
        return TwoPassPeaks(
            held_at_peak(records, 0, self._end).total_bytes,
            # Plain Lightning keeps the gradients of the step before through the forward.
            max(
                forward_bytes + self._gradient_bytes,
                held_at_peak(plain, self._second, self._end).total_bytes,
            ),
        )


def as_one_pass(
    records: Iterable[StorageRecord], first: Sequence[int], second: Sequence[int]
) -> list[StorageRecord]:
    """The lives of storages as they would have been had the second backward been the only one.

    Both do the same in the same order, so that the gradients that arrive tell what belongs together. What the
    first one has left, as recomputed activations, would have been made in the second; and gradients of that
    would have stayed.

    Args:
        records: of a ledger that has watched the step.
        first: ticks at which the first backward began and each of its gradients was complete, ascending.
        second: those of the second one, as many.

    Returns:
        Records that are true from the beginning of the second backward on.
    """
    begin, end = first[0], second[0]
    found = []
    for one in records:
        if begin < one.born <= end:
            if one.died is not None and one.died <= end:
                continue
            moved = StorageRecord(one.num_bytes, second[bisect_left(first, one.born) - 1], one.category)
            moved.died = one.died
        elif one.born > end and one.category is Category.GRADIENTS:
            moved = StorageRecord(one.num_bytes, one.born, one.category)
        else:
            moved = one
        found.append(moved)
    return found
