"""Which weights to drop, where to grow, and how many in which layer: pure functions of one update."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memtrain.sparsity.methods.distributions import apportion
from lightning_memtrain.sparsity.methods.value_schedules import Schedule
from lightning_memtrain.sparsity.radix_select import are_largest, keys_of, level_of_largest


@dataclass(frozen=True)
class Layer:
    """What an update sees of a sparse layer.

    Args:
        name: its path in the model.
        shape: of the dense weight.
        decode: makes the flat positions of its nonzero weights, int64, ascending.
        values: their values, in that order.
        candidate_positions: inactive positions with the largest gradients, as far as a rule asked for them.
        candidate_gradients: their gradients.
        gradients: gradients of the values, in their order and scaled as those of the candidates.
    """

    name: str
    shape: Sequence[int]
    decode: Callable[[], Tensor]
    values: Tensor
    candidate_positions: Tensor | None = None
    candidate_gradients: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def numel(self) -> int:
        """Weights, zeros included."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Weights that are stored."""
        return self.values.numel()

    @property
    def positions(self) -> Tensor:
        """Made at each look, 8 bytes each, so that those of one layer exist at a time."""
        return self.decode()


@dataclass(frozen=True)
class Moment:
    """When an update is.

    Args:
        step: optimizer steps completed.
        elapsed: steps since schedules began.
        span: steps from there to where schedules end; 0 if there is no end.
        seed: of the run.
    """

    step: int
    elapsed: int
    span: int
    seed: int = 0

    def generator(self, layer: str) -> torch.Generator:
        """Random numbers that depend on seed, step and layer only: the same on every rank, and after resume.

        Args:
            layer: its name.

        Returns:
            A generator on the CPU.
        """
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{layer}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Change:
    """What an update does to one layer.

    Args:
        kept: for each weight that is stored, whether it stays, with its value and optimizer state.
        grown: ascending flat positions that start at 0; some may have been dropped just now.
    """

    kept: Tensor
    grown: Tensor

    @property
    def num_dropped(self) -> int:
        """Weights that go."""
        return self.kept.numel() - int(self.kept.sum())


State = Mapping[str, float]
"""What a method keeps between updates, e.g. ``{"threshold": 0.001}``."""


def smallest(values: Tensor, count: int) -> Tensor:
    """Which are left without the ``count`` smallest magnitudes; of equal ones the first goes first.

    Args:
        values: of one layer.
        count: how many to drop, at most all.

    Returns:
        ``True`` for those that stay.

    Example:
        >>> smallest(torch.tensor([0.3, -0.1, 0.1, 2.0]), count=1)
        tensor([ True, False,  True,  True])
    """
    return are_largest(keys_of(values), values.numel() - count)


def sample_inactive(numel: int, taken: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw positions that are not taken, uniformly and without repetition.

    Memory is in proportion to ``taken`` and ``count``, never to ``numel``: the ``r``-th free position is
    ``r`` plus the number of taken ones before it, which a search in the gaps between them finds.

    Args:
        numel: positions in all.
        taken: ascending ones that are not free, int64.
        count: how many to draw, at most all free ones.
        generator: on the CPU.

    Returns:
        Ascending positions, int64, on the device of ``taken``.

    Example:
        >>> sample_inactive(6, torch.tensor([1, 2, 4]), 3, torch.Generator())
        tensor([0, 3, 5])
    """
    num_free = numel - taken.numel()
    ranks = _sample_ranks(num_free, count, generator).to(taken.device)
    free_before = taken - torch.arange(taken.numel(), device=taken.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def _sample_ranks(total: int, count: int, generator: torch.Generator) -> Tensor:
    """A sorted uniform sample of ``range(total)``, in memory for ``count`` numbers."""
    if count > total // 2:
        left_out = _sample_ranks(total, total - count, generator)
        keep = torch.ones(total, dtype=torch.bool)
        keep[left_out] = False
        return keep.nonzero().flatten()
    drawn = torch.empty(0, dtype=torch.int64)
    # Drawing only as many as are missing never draws too many, so no choice among them can be unfair.
    while (missing := count - drawn.numel()) > 0:
        drawn = torch.cat([drawn, torch.randint(total, (missing,), generator=generator)]).unique()  # type: ignore[no-untyped-call]
    return drawn


class DropRule(ABC):
    """Says which weights go."""

    @abstractmethod
    def kept(self, layer: Layer, moment: Moment, state: State) -> Tensor:
        """Choose within a layer.

        Args:
            layer: the layer.
            moment: when.
            state: of the method.

        Returns:
            ``True`` for each weight that stays.
        """


@dataclass(frozen=True)
class DropFraction(DropRule):
    r"""Drops the :math:`\lfloor f(t)\, k \rfloor` smallest magnitudes of the :math:`k` weights of a layer.

    Args:
        fraction: :math:`f`, in ``[0, 1)``.
    """

    fraction: Schedule

    def num_dropped(self, nnz: int, moment: Moment) -> int:
        """How many go.

        Args:
            nnz: weights that the layer stores.
            moment: when.

        Returns:
            Fewer than ``nnz``.
        """
        return math.floor(self.fraction.value(moment.elapsed, moment.span) * nnz)

    def kept(self, layer: Layer, moment: Moment, state: State) -> Tensor:
        """All but the smallest."""
        return smallest(layer.values, self.num_dropped(layer.nnz, moment))


@dataclass(frozen=True)
class DropBelowThreshold(DropRule):
    """Drops what is smaller than the state's ``threshold``; a layer that would lose all keeps its largest."""

    def kept(self, layer: Layer, moment: Moment, state: State) -> Tensor:
        """All that reach the threshold."""
        kept = layer.values.abs() >= state["threshold"]
        if not kept.any():
            kept[layer.values.abs().argmax()] = True
        return kept


class GrowRule(ABC):
    """Says where weights grow."""

    #: Whether the layer must come with candidates.
    needs_gradient = False

    @abstractmethod
    def change(self, layer: Layer, kept: Tensor, count: int, moment: Moment) -> Change:
        """Choose within a layer.

        Args:
            layer: the layer.
            kept: what a drop rule said.
            count: how many weights to add to those that are kept.
            moment: when.

        Returns:
            What becomes of the layer.
        """


@dataclass(frozen=True)
class GrowRandom(GrowRule):
    """Grows uniformly among inactive positions.

    Args:
        may_return: whether those that were dropped just now count as inactive. If there are not enough
            others, they do.
    """

    may_return: bool = True

    def change(self, layer: Layer, kept: Tensor, count: int, moment: Moment) -> Change:
        """Draw positions."""
        enough = count <= layer.numel - layer.nnz
        taken = layer.positions if enough and not self.may_return else layer.positions[kept]
        return Change(kept, sample_inactive(layer.numel, taken, count, moment.generator(layer.name)))


@dataclass(frozen=True)
class GrowByGradient(GrowRule):
    """Grows where the gradient is largest, among all positions that are not kept.

    A weight that was dropped just now and has one of the largest gradients stays as it is, with its value and
    optimizer state. An infinite gradient, as a scaled loss may give, is the largest; where it is not a number
    nothing grows.
    """

    needs_gradient = True

    def change(self, layer: Layer, kept: Tensor, count: int, moment: Moment) -> Change:
        """Choose the largest; of equal ones the first position."""
        if layer.candidate_positions is None or layer.candidate_gradients is None:
            # A layer without room: what was dropped can only return.
            return Change(torch.ones_like(kept), torch.empty(0, dtype=torch.int64, device=kept.device))
        candidates, gradients = layer.candidate_positions, layer.candidate_gradients
        if gradients.isnan().any():
            is_number = ~gradients.isnan()
            candidates, gradients = candidates[is_number], gradients[is_number]
        dropped = (~kept).nonzero().view(-1)
        # Those without a gradient of their own have the key -1: they come last, as in a layer without any.
        own_keys = torch.full_like(dropped, -1, dtype=torch.int32)
        if layer.gradients is not None:
            own = layer.gradients.index_select(0, dropped).to(gradients.dtype)
            own_keys = keys_of(own).masked_fill_(own.isnan(), -1)
        keys = torch.cat([keys_of(gradients), own_keys])
        best = _best(keys, count, candidates, lambda: layer.positions[dropped])
        kept = kept.clone()
        kept[dropped[best[len(candidates) :]]] = True
        return Change(kept, candidates[best[: len(candidates)]])


def _best(keys: Tensor, count: int, candidates: Tensor, others: Callable[[], Tensor]) -> Tensor:
    """Which keys are the largest; of equal ones those with the first positions, candidates' or others'."""
    if count >= len(keys):
        return torch.ones_like(keys, dtype=torch.bool)
    if not count:
        return torch.zeros_like(keys, dtype=torch.bool)
    level = level_of_largest(lambda: [keys + 1], count)
    best, equal = keys > level.key - 1, (keys == level.key - 1).nonzero().view(-1)
    if level.num_equal < len(equal):
        positions = torch.cat([candidates, others()])[equal]
        equal = equal[positions.argsort()[: level.num_equal]]
    best[equal] = True
    return best


class Budget(ABC):
    """Says how many weights grow in each layer."""

    @abstractmethod
    def num_grown(self, layers: Mapping[str, Layer], num_left: Mapping[str, int]) -> dict[str, int]:
        """Divide what was dropped.

        Args:
            layers: by name.
            num_left: weights of each that are kept.

        Returns:
            How many grow in each layer; as many in all as were dropped.
        """


@dataclass(frozen=True)
class PerLayer(Budget):
    """A layer grows as many as it dropped."""

    def num_grown(self, layers: Mapping[str, Layer], num_left: Mapping[str, int]) -> dict[str, int]:
        """What was dropped."""
        return {name: layer.nnz - num_left[name] for name, layer in layers.items()}


@dataclass(frozen=True)
class AcrossLayers(Budget):
    r"""Gives the :math:`\sum_l K_l` dropped weights to layers in proportion to the :math:`R_l` they kept.

    The sum is exact (largest remainders), and a layer takes no more than it has room for besides what it
    dropped just now. If the whole model has too little room, it may take those, too.
    """

    def num_grown(self, layers: Mapping[str, Layer], num_left: Mapping[str, int]) -> dict[str, int]:
        """Divide among all layers."""
        total = sum(layer.nnz - num_left[name] for name, layer in layers.items())
        room = [layer.numel - layer.nnz for layer in layers.values()]
        if sum(room) < total:
            room = [layer.numel - num_left[name] for name, layer in layers.items()]
        grown = apportion(total, [num_left[name] for name in layers], room)
        return dict(zip(layers, grown, strict=True))
