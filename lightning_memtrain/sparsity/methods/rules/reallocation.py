"""How many weights grow in which layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_memtrain.sparsity.methods.apportionment import apportion
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView


class Reallocation(ABC):
    """Says how many weights grow in each layer."""

    @abstractmethod
    def num_grown(self, layers: Mapping[str, LayerView], num_left: Mapping[str, int]) -> dict[str, int]:
        """Say how many weights grow in each layer, as many in all as were dropped.

        Args:
            layers: by name.
            num_left: weights of each that are kept.

        Returns:
            How many grow in each layer; as many in all as were dropped.
        """


@dataclass(frozen=True)
class WithinLayers(Reallocation):
    """A layer grows as many as it dropped."""

    def num_grown(self, layers: Mapping[str, LayerView], num_left: Mapping[str, int]) -> dict[str, int]:
        """As many as the layer dropped."""
        return {name: layer.nnz - num_left[name] for name, layer in layers.items()}


@dataclass(frozen=True)
class AcrossLayers(Reallocation):
    r"""Gives the :math:`\sum_l K_l` dropped weights to layers in proportion to the :math:`R_l` they kept.

    The sum is exact (largest remainders), and a layer takes no more than it has room for besides what it
    dropped just now. If the whole model has too little room, it may take those, too.
    """

    def num_grown(self, layers: Mapping[str, LayerView], num_left: Mapping[str, int]) -> dict[str, int]:
        """What all layers dropped, divided in proportion to what each kept."""
        total = sum(layer.nnz - num_left[name] for name, layer in layers.items())
        room = [layer.numel - layer.nnz for layer in layers.values()]
        if sum(room) < total:
            room = [layer.numel - num_left[name] for name, layer in layers.items()]
        grown = apportion(total, [num_left[name] for name in layers], room)
        return dict(zip(layers, grown, strict=True))
