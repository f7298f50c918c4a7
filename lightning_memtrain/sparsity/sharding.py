"""Values whose entries are divided among ranks, as ``fully_shard`` does it.

Shards keep their size for life, so entries can move within a layer only if as many grow as are dropped.
Patterns are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight


def divides_parameters(strategy: Any) -> bool:
    """Whether parameters are divided in the user's ``configure_model``."""
    return any(base.__name__ == "ModelParallelStrategy" for base in type(strategy).__mro__)


def reshard(model: nn.Module) -> None:
    """Give layers their shards back: after a forward without a backward, the outermost has whole parameters.

    Args:
        model: with parts that ``fully_shard`` was called on, or without.
    """
    for module in model.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def refuse_late(layers: Mapping[str, nn.Module], known: set[int]) -> None:
    """Refuse layers that nobody could make sparse before they were divided.

    Args:
        layers: that should be sparse, but are dense, after ``configure_model``.
        known: by ``id``, modules that were there when layers were made sparse.

    Raises:
        MisconfigurationException: naming the first.
    """
    for name, layer in layers.items():
        if id(layer) not in known:
            raise MisconfigurationException(
                "`SparseTraining` needs layers before `fully_shard` divides them, but "
                f"{name!r} was made in `configure_model`. Make it in `__init__`, call "
                "`SparseTraining.convert(self)` in `configure_model` before `fully_shard`, or name the layer "
                "in Select(dense=...)."
            )


def refuse_meta(model: nn.Module) -> None:
    """Refuse weights without data, whose values could not be taken out.

    Args:
        model: before it is made sparse.

    Raises:
        MisconfigurationException: naming the first.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise MisconfigurationException(
                f"`SparseTraining` needs weights with data before `fully_shard`, but {name!r} is on meta. "
                "Make the model on the CPU; `fully_shard` moves the shards."
            )


def refuse_other_shards(weights: Mapping[str, SparseWeight], num_ranks: int) -> None:
    """Refuse values that are not divided evenly over all ranks.

    Args:
        weights: by layer, after ``configure_model``.
        num_ranks: of the run.

    Raises:
        MisconfigurationException: naming the first.
    """
    for name, weight in weights.items():
        values = weight.values.data
        if isinstance(values, DTensor):
            mesh = values.device_mesh
            if (
                tuple(values.placements) == (Shard(0),)
                and mesh.size() == num_ranks
                and "tensor_parallel" not in (mesh.mesh_dim_names or ())
            ):
                continue
            found = f"are {tuple(values.placements)} over {tuple(mesh.shape)} of {num_ranks} ranks"
        else:
            found = "are whole"
        raise MisconfigurationException(
            "`SparseTraining` with ModelParallelStrategy needs values that `fully_shard` divides among all "
            f"ranks, but those of {name!r} {found}. Call `fully_shard` in `configure_model` for all "
            "layers, with data_parallel_size as many as there are ranks, and name layers of tensor "
            "parallelism in Select(dense=...)."
        )
