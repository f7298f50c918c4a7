"""How many weights each layer keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.module_selectors import matches_nothing
from lightning_memtrain.sparsity.methods.apportionment import apportion

Shapes = Mapping[str, Sequence[int]]


class StackedShape(tuple[int, ...]):
    """Shape of a weight that is several matrices, one for each number along its first axis.

    Example:
        >>> shapes = {"experts": StackedShape((8, 64, 16)), "head": (64, 16)}
        >>> ErdosRenyi().counts(shapes, sparsity=0.75)
        {'experts': 2048, 'head': 256}
    """


def num_kept(numel: int, sparsity: float) -> int:
    r"""Weights that a layer keeps: :math:`n - \lfloor s n \rfloor`, at least one.

    Args:
        numel: weights of the layer, :math:`n`.
        sparsity: fraction of zeros :math:`s`, in ``[0, 1)``.

    Returns:
        A number from 1 to ``numel``.

    Example:
        >>> num_kept(numel=9, sparsity=0.9)
        1
    """
    return numel - math.floor(sparsity * numel)


def check_sparsity(value: Any, argument: str) -> float:
    """Refuse what is no fraction of zeros.

    Args:
        value: what a user gave.
        argument: its name, for the error.

    Returns:
        The fraction.

    Raises:
        ArgumentError: if it lies outside ``[0, 1)``.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 <= value < 1:
        return float(value)
    cure = "Use e.g. 0.9 for one weight in ten."
    if is_number and 1 < value < 100:
        cure = f"For {value:g} % zeros write {value / 100:g}."
    raise ArgumentError(f"`{argument}` must be the fraction of zeros, in [0, 1), but got {value!r}. {cure}")


class Distribution(ABC):
    """Spreads one sparsity over layers."""

    @abstractmethod
    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """Weights that each layer keeps.

        Args:
            shapes: of the weights, by layer, e.g. ``(out, in, height, width)``.
            sparsity: fraction of zeros over all layers, in ``[0, 1)``.

        Returns:
            From 1 to all of its weights, by layer.

        Raises:
            MisconfigurationException: if there are fewer weights to keep than layers.
        """


@dataclass(frozen=True)
class Uniform(Distribution):
    """Gives every layer the same sparsity.

    Example:
        >>> Uniform().counts({"fc1": (4, 4), "fc2": (8, 8)}, sparsity=0.5)
        {'fc1': 8, 'fc2': 32}
    """

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """The same fraction of each layer, rounded up."""
        return {name: num_kept(math.prod(shape), sparsity) for name, shape in shapes.items()}


@dataclass(frozen=True)
class ErdosRenyi(Distribution):
    r"""Keeps layers denser that have few inputs and outputs.

    Layer :math:`l` keeps the fraction :math:`\min(1, \varepsilon (n_{in} + n_{out}) / (n_{in} n_{out}))`,
    with one :math:`\varepsilon` for all such that the total is right. Counts are rounded by largest
    remainder, so that the total is exact.

    Example:
        >>> ErdosRenyi().counts({"fc1": (4, 4), "fc2": (8, 8)}, sparsity=0.5)
        {'fc1': 13, 'fc2': 27}

    References:
        Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity,
        Nature Communications 2018, arXiv:1707.04780.
    """

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """As many as the total allows, in proportion to each layer's size along its axes."""
        numels = {name: math.prod(shape) for name, shape in shapes.items()}
        total = num_kept(sum(numels.values()), sparsity)
        if total < len(shapes):
            raise MisconfigurationException(
                f"`{type(self).__name__}` needs at least one weight for each layer, but a sparsity of "
                f"{sparsity:g} leaves {total} for {len(shapes)} layers. Lower the sparsity."
            )
        weights = [
            shape[0] * self._weight(shape[1:]) if isinstance(shape, StackedShape) else self._weight(shape)
            for shape in shapes.values()
        ]
        counts = apportion(total, weights, list(numels.values()))
        # A layer without weights would end the network: it takes one from the largest.
        for place, count in enumerate(counts):
            if count == 0:
                counts[place] = 1
                counts[counts.index(max(counts))] -= 1
        return dict(zip(shapes, counts, strict=True))

    def _weight(self, shape: Sequence[int]) -> int:
        """What the number of kept weights is proportional to: the kept fraction times all weights."""
        return sum(shape[:2]) * math.prod(shape[2:])


@dataclass(frozen=True)
class ErdosRenyiKernel(ErdosRenyi):
    r"""Keeps layers denser that are small along every axis, height and width of a kernel included.

    Layer :math:`l` with shape :math:`s_l` and :math:`n_l` weights keeps the fraction
    :math:`\min(1, \varepsilon \sum_i s_{l,i} / n_l)`, with one :math:`\varepsilon` for all such that the
    total is right. Counts are rounded by largest remainder, so that the total is exact.

    Example:
        >>> ErdosRenyiKernel().counts({"conv": (16, 3, 3, 3), "fc": (10, 64)}, sparsity=0.8)
        {'conv': 54, 'fc': 161}

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134.
    """

    def _weight(self, shape: Sequence[int]) -> int:
        return sum(shape)


def counts_by_layer(
    shapes: Shapes,
    sparsity: float | Mapping[str, float],
    distribution: Distribution,
    overrides: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Weights that each layer keeps, with exceptions.

    Args:
        shapes: of the weights, by layer.
        sparsity: of all layers without exceptions together; or by layer, where ``*`` stands for any text.
            Layers that are not named stay dense.
        distribution: spreads it.
        overrides: sparsities of single layers, likewise. The others keep to ``sparsity`` among themselves.

    Returns:
        Numbers by layer, in the order of ``shapes``; dense layers are left out.

    Raises:
        ArgumentError: if a name matches no layer.
    """
    single = dict(overrides or {}) | (dict(sparsity) if isinstance(sparsity, Mapping) else {})
    unused = [pattern for pattern in single if not any(fnmatchcase(name, pattern) for name in shapes)]
    if unused:
        # Both are given by layer, and are together here.
        argument = "Select(overrides)" if unused[0] in (overrides or {}) else "sparsity"
        raise matches_nothing(argument, unused[0], shapes, "layers that become sparse")
    named = {
        name: value for name in shapes for pattern, value in single.items() if fnmatchcase(name, pattern)
    }
    counts = {name: num_kept(math.prod(shapes[name]), value) for name, value in named.items()}
    rest = {name: shape for name, shape in shapes.items() if name not in named}
    if rest and not isinstance(sparsity, Mapping):
        counts |= distribution.counts(rest, sparsity)
    return {name: counts[name] for name in shapes if name in counts}
