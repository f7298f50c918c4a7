"""What a chunk was seen to hold, and what a batch of such chunks holds by that."""

from __future__ import annotations

from typing import NamedTuple

from lightning_memtrain.core import CategoryBytes


class ChunkMeasurement(NamedTuple):
    """A chunk that ran to its end.

    Args:
        chunks_bytes: the most that a batch of such chunks holds until all have run.
        held: what the ledger counted at the highest moment of the chunk.
        update_bytes: the most that there is from then on, until the optimizer has stepped.
        left: what the ledger counted then.
        growing_bytes: the part of the peak that the samples of the chunk hold.
        kept_bytes: what the chunk leaves behind until the batch is over.
    """

    chunks_bytes: int
    held: CategoryBytes
    update_bytes: int
    left: CategoryBytes
    growing_bytes: int
    kept_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that such a batch holds in all."""
        return max(self.chunks_bytes, self.update_bytes)
