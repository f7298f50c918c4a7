"""Weights of a model that can be sparse, and where they are."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn

from lightning_memtrain.compat.torch_private import ConvNd
from lightning_memtrain.sparsity.methods.distributions import StackedShape
from lightning_memtrain.sparsity.storage.layers.sparse_parameters import can_be_sparse


class WeightLocation(NamedTuple):
    """A weight that can be sparse.

    Args:
        module: that has it.
        attribute: its name there.
        name: its name in the model.
    """

    module: nn.Module
    attribute: str
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The dense weight itself."""
        return cast(nn.Parameter, self.module._parameters[self.attribute])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; a stack of matrices where there is one for each expert."""
        shape = tuple(self.parameter.shape)
        is_stacked = can_be_sparse(self.module, self.attribute) and len(shape) == 3
        return StackedShape(shape) if is_stacked else shape


def weight_locations(model: nn.Module) -> dict[str, WeightLocation]:
    """Weights that can be sparse, if their layers are chosen.

    Args:
        model: the module that is trained.

    Returns:
        By path of the layer, in the order of the model, without those within TorchScript.
    """
    locations = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose forward cannot be changed
            continue
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if can_be_sparse(module, attribute):
                locations[name] = WeightLocation(module, attribute, name)
            elif attribute == "weight" and parameter is not None and is_linear_or_convolution(module):
                locations[path] = WeightLocation(module, attribute, name)
    return locations


def is_linear_or_convolution(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution layer.

    Args:
        module: any.

    Returns:
        ``True`` for subclasses, too.
    """
    return isinstance(module, (nn.Linear, ConvNd))
