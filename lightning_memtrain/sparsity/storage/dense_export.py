"""A dense state_dict of a model with sparse layers, or of what was saved of one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_memtrain.core.compiled_modules import before_compilation
from lightning_memtrain.sparsity.storage.checkpoint_key import CHECKPOINT_KEY
from lightning_memtrain.sparsity.storage.layers.autograd_functions import DenseWeightFunction
from lightning_memtrain.sparsity.storage.layers.sparse_layer import SparseLayer
from lightning_memtrain.sparsity.storage.layers.sparse_parameters import SPARSE_SUFFIX
from lightning_memtrain.sparsity.storage.patterns import pattern_fault
from lightning_memtrain.sparsity.storage.shards import full_tensor


def export_dense(module: nn.Module) -> dict[str, Tensor]:
    """A plain ``state_dict`` that loads, strictly, into the class that the model has without sparse layers.

    What ``fully_shard`` divided is whole here: all ranks have to call this, and each gets everything.

    Args:
        module: with or without sparse layers; stays as it is.

    Returns:
        Every entry of ``module.state_dict()``, with a dense ``weight`` for each sparse layer's values and
        pattern. These weights are made for it; the rest shares memory with the model, as in any
        ``state_dict``.

    Example:
        >>> import torch
        >>> from lightning_memtrain.sparsity import sparsify_
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> _ = sparsify_(layer, {"weight": torch.tensor([0, 3])})
        >>> export_dense(layer)
        {'weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    module = before_compilation(module)
    state: dict[str, Tensor] = module.state_dict()
    layers = {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, SparseLayer)
    }
    dense: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix, _, last = key.rpartition(".")
        if prefix not in layers or last not in ("values", "sparsity_pattern"):
            dense[key] = full_tensor(value)
        elif last == "values":
            layer = layers[prefix]
            dense[layer.dense_key(f"{prefix}." if prefix else "")] = layer.dense()
    return dense


@torch.no_grad()
def dense_state_dict(state_dict: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """What was saved of a model with sparse layers, for the model that it is without them.

    A checkpoint says which entries it has of each weight, and the model says of what shape the weight is.
    The patterns of two checkpoints of one run differ, so average dense weights and not stored ones.

    Args:
        state_dict: of a model with sparse layers, or of one without, such as the ``"state_dict"`` of a
            checkpoint by Lightning.
        module: the model with none of them; stays as it is.

    Returns:
        Every entry of ``state_dict``, with a dense ``weight`` of the same dtype in place of values and
        pattern. These weights are made for it; the rest is what was given.

    Raises:
        ValueError: if ``module`` has no dense weight where values were saved, or one of another shape, or a
            pattern is damaged.

    Example:
        >>> from lightning_memtrain.sparsity import sparsify_
        >>> sparse, dense = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.ones_(sparse.weight)
        >>> _ = sparsify_(sparse, {"weight": torch.tensor([0, 3])})
        >>> dense_state_dict(sparse.state_dict(), dense)
        {'weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    weights: Mapping[str, Tensor] = module.state_dict()
    dense: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        path, dot, last = key.rpartition(".")
        pattern, weight_key = state_dict.get(f"{path}{dot}sparsity_pattern"), f"{path}{dot}weight"
        if path.endswith(SPARSE_SUFFIX) and weight_key not in weights:
            weight_key = path.removesuffix(SPARSE_SUFFIX)
        if key == CHECKPOINT_KEY or last == "sparsity_pattern":
            continue
        if last != "values" or pattern is None:
            dense[key] = value
            continue
        subject = f"`dense_state_dict(state_dict)` holds {key!r} of a sparse layer, but "
        if weight_key not in weights:
            raise ValueError(
                f"{subject}the {type(module).__name__} has no dense {weight_key!r}. Pass the model that was "
                "trained, as it is without sparse layers."
            )
        shape = weights[weight_key].shape
        if (complaint := pattern_fault(pattern, value, shape)) is not None:
            raise ValueError(f"{subject}their pattern {complaint}")
        dense[weight_key] = DenseWeightFunction.apply(value, pattern, shape, None)  # type: ignore[no-untyped-call]
    return dense
