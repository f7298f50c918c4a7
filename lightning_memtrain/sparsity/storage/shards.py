"""Values whose entries ``fully_shard`` divided among ranks: all of them, or those of this rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def full_tensor(tensor: Tensor) -> Tensor:
    """All entries on every rank, where all have to ask for them.

    Args:
        tensor: of any shape and dtype; divided, or plain, which is returned as it is.

    Returns:
        A plain tensor of the whole shape.
    """
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


@torch.no_grad()
def prepare_write(shards_of: DTensor, entries: Tensor) -> Callable[[], None]:
    """Prepare to put new entries in the place of the old ones, each rank its own.

    Args:
        shards_of: what is divided.
        entries: all of them, of the whole shape and the same dtype, equal on all ranks.

    Returns:
        Does it without a new tensor; may be called several times.
    """
    mesh = shards_of.device_mesh
    everywhere = DTensor.from_local(entries, mesh, [Replicate()] * mesh.ndim, run_check=False)
    old, new = shards_of.to_local(), everywhere.redistribute(placements=shards_of.placements).to_local()

    def copy() -> None:
        with torch.no_grad():
            old.copy_(new)

    return copy
