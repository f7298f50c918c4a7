"""Growth: what steps leave behind, told from what is merely late to be freed or made once."""

from __future__ import annotations

from collections.abc import Container, Iterable

from lightning_memtrain.compat.torch_private import storage_key
from lightning_memtrain.core import Growth
from lightning_memtrain.ledger import Survivor, sum_growth

# A cache that is filled once (a mask, communication buckets) lives on without growing.
MIN_STEPS = 2


class GrowthDetector:
    """Follows the survivors of watched steps.

    A step's output, a logged value or the state of a metric lives until the next step replaces it. So a
    survivor counts only once it has outlived the whole step after its own; and what a module leaves behind
    is growth once survivors of two of its steps are live at the same time.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._suspects: list[tuple[int, Survivor]] = []
        self._outlived: list[tuple[int, Survivor]] = []
        self.largest: tuple[Growth, ...] = ()
        """The growth at the moment when it was most: a list that is emptied after each epoch shows, too."""

    @property
    def has_suspects(self) -> bool:
        """Whether anything has outlived its step that may yet be freed."""
        return bool(self._suspects)

    def end_step(
        self, survivors: Iterable[Survivor] = (), *, spared: Container[int] = ()
    ) -> tuple[Growth, ...]:
        """Judge the suspects of earlier steps, now that another step is over, and take in its own survivors.

        Args:
            survivors: what outlived the step that ends; none for a step that the ledger did not watch.
            spared: storages (by their ``_cdata``) that are not to be judged yet, because they are kept for a
                known reason.

        Returns:
            What modules have left behind that is still live, per module, largest first.
        """
        undecided: list[tuple[int, Survivor]] = []
        for step, suspect in self._suspects:
            storage = suspect.reference()
            if storage is not None:
                (undecided if storage_key(storage) in spared else self._outlived).append((step, suspect))
        self._suspects = [*undecided, *((self._num_steps, survivor) for survivor in survivors)]
        self._num_steps += 1

        self._outlived = [(step, survivor) for step, survivor in self._outlived if survivor.alive]
        steps_of_modules: dict[str, set[int]] = {}
        for step, survivor in self._outlived:
            steps_of_modules.setdefault(survivor.module, set()).add(step)
        growth = sum_growth(
            (survivor.module, survivor.num_bytes)
            for _, survivor in self._outlived
            if len(steps_of_modules[survivor.module]) >= MIN_STEPS
        )
        if total_bytes(growth) > total_bytes(self.largest):
            self.largest = growth
        return growth


def total_bytes(growth: Iterable[Growth]) -> int:
    """Bytes that all modules together left behind."""
    return sum(row.num_bytes for row in growth)
