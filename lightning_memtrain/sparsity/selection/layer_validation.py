"""Weights that cannot be taken out of their layer, each with the reason and a way out."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.sparsity.selection.weight_locations import WeightLocation
from lightning_memtrain.sparsity.storage.layers.layer_types import SPARSE_TYPES
from lightning_memtrain.sparsity.storage.layers.sparse_parameters import can_be_sparse


def refuse_layers(model: nn.Module, layers: Mapping[str, WeightLocation]) -> None:
    """Refuse weights that cannot be taken out of their layer.

    Args:
        model: the module that is trained.
        layers: what is to become sparse.

    Raises:
        MisconfigurationException: naming the layer.
    """
    weights = {id(location.parameter): path for path, location in layers.items()}
    for path, location in layers.items():
        kind = type(location.module)
        if is_lazy(location.parameter):
            raise MisconfigurationException(
                f"`SparseTraining` needs layers whose weights exist, but {path!r} is {kind.__name__}. "
                "Run the model on one batch in `__init__`, or name it in Select(dense=...)."
            )
        if kind not in SPARSE_TYPES and not can_be_sparse(location.module, location.attribute):
            raise MisconfigurationException(
                f"`SparseTraining` cannot make {path!r} sparse, since {kind.__name__} is a class of "
                f"its own, whose methods would be lost or would not know sparse values. Add {path!r} to "
                "Select(dense=[...]), or use torch's own layer."
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied = weights.get(id(parameter))
        if tied is not None and name != layers[tied].name:
            raise MisconfigurationException(
                f"`SparseTraining` cannot make {tied!r} sparse, since its weight is tied to {name!r} and "
                f"would no longer be. Add {tied!r} to Select(dense=...), or untie them."
            )
