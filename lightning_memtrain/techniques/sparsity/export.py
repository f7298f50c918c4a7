"""A dense state_dict of a model with sparse layers."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_memtrain.techniques.sparsity import sharding
from lightning_memtrain.techniques.sparsity.layers import SparseLayer


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
        >>> from lightning_memtrain import sparsify_
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> _ = sparsify_(layer, {"weight": torch.tensor([0, 3])})
        >>> export_dense(layer)
        {'weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
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
            dense[key] = sharding.whole(value)
        elif last == "values":
            dense[f"{prefix}.weight" if prefix else "weight"] = layers[prefix].dense()
    return dense
