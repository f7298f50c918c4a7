"""Methods of sparse training, each composed of a rule to drop, a rule to grow and a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.techniques.sparsity.clocks import UpdateClock, UpdateEvery
from lightning_memtrain.techniques.sparsity.distributions import (
    Distribution,
    Shapes,
    Uniform,
    check_sparsity,
    planned_counts,
)
from lightning_memtrain.techniques.sparsity.rules import (
    AcrossLayers,
    Budget,
    Change,
    DropBelowThreshold,
    DropFraction,
    DropRule,
    GrowByGradient,
    GrowRandom,
    GrowRule,
    Layer,
    Moment,
    PerLayer,
    State,
    smallest,
)
from lightning_memtrain.techniques.sparsity.schedules import (
    CosineSchedule,
    CubicSchedule,
    Schedule,
    as_schedule,
)

Sparsity = float | dict[str, float]
Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Update:
    """What an update does.

    Args:
        changes: by layer.
        state: of the method, from now on.
    """

    changes: Mapping[str, Change]
    state: State = field(default_factory=dict)


class SparseMethod(ABC):
    """Says how sparse each layer is, and which weights it has at what time.

    Methods hold no state: an update is a function of the layers, the time and what the method said before.
    """

    @property
    def clock(self) -> UpdateClock | None:
        """When the pattern changes unless a user says so; ``None`` for never."""
        return UpdateEvery(100, start=0, stop=0.75)

    @property
    def changes_counts(self) -> bool:
        """Whether the number of weights of a layer can change."""
        return False

    @property
    def needs_end(self) -> bool:
        """Whether updates depend on which is the last."""
        return False

    @property
    def starts_dense(self) -> bool:
        """Whether the first steps need as much memory as dense training."""
        return False

    @abstractmethod
    def counts(self, shapes: Shapes, overrides: Mapping[str, float]) -> dict[str, int]:
        """Weights of each layer at the start of the run.

        Args:
            shapes: of all layers that may be sparse.
            overrides: sparsities of single layers.

        Returns:
            Numbers by layer; layers that stay dense are left out.
        """

    def initial_state(self, nnz: int) -> dict[str, float]:
        """What the method keeps between updates.

        Args:
            nnz: weights of all layers together.

        Returns:
            Names and numbers.
        """
        return {}

    def num_candidates(self, nnz: Mapping[str, int], moment: Moment) -> dict[str, int]:
        """Inactive positions with the largest gradients that an update has to know.

        Args:
            nnz: weights by layer.
            moment: of the update.

        Returns:
            Numbers by layer; empty if gradients do not matter.
        """
        return {}

    @abstractmethod
    def update(self, layers: Mapping[str, Layer], moment: Moment, state: State) -> Update:
        """One change of the pattern.

        Args:
            layers: by name, in the order of the model.
            moment: when.
            state: what :meth:`initial_state` or the update before returned.

        Returns:
            Changes of layers, and the new state.
        """


@dataclass(frozen=True)
class StaticSparse(SparseMethod):
    """Trains a random pattern that never changes.

    Args:
        sparsity: fraction of zeros, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
        distribution: spreads it over layers.

    Raises:
        MisconfigurationException: if ``sparsity`` is out of its range.

    Example:
        >>> StaticSparse(0.9).counts({"fc": (10, 100)}, overrides={})
        {'fc': 100}
    """

    sparsity: Sparsity
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        _check_sparsities(self, self.sparsity)

    @property
    def clock(self) -> UpdateClock | None:
        """The pattern never changes."""
        return None

    def counts(self, shapes: Shapes, overrides: Mapping[str, float]) -> dict[str, int]:
        """What the distribution says."""
        return planned_counts(shapes, self.sparsity, self.distribution, overrides)

    def update(self, layers: Mapping[str, Layer], moment: Moment, state: State) -> Update:
        """No change."""
        return Update({}, state)


class DropAndGrow(SparseMethod):
    """Drops some weights, and grows as many: all of dynamic sparse training is this with other rules."""

    sparsity: Sparsity
    distribution: Distribution

    @property
    @abstractmethod
    def drop_rule(self) -> DropRule:
        """Which weights go."""

    @property
    @abstractmethod
    def grow_rule(self) -> GrowRule:
        """Where weights grow."""

    @property
    def budget(self) -> Budget:
        """How many grow in each layer."""
        return PerLayer()

    def counts(self, shapes: Shapes, overrides: Mapping[str, float]) -> dict[str, int]:
        """What the distribution says."""
        return planned_counts(shapes, self.sparsity, self.distribution, overrides)

    def update(self, layers: Mapping[str, Layer], moment: Moment, state: State) -> Update:
        """Drop, divide, grow."""
        kept = {name: self.drop_rule.kept(layer, moment, state) for name, layer in layers.items()}
        num_left = {name: int(stays.sum()) for name, stays in kept.items()}
        num_grown = self.budget.num_grown(layers, num_left)
        changes = {
            name: self.grow_rule.change(layer, kept[name], num_grown[name], moment)
            for name, layer in layers.items()
            if num_grown[name] or num_left[name] < layer.nnz
        }
        num_dropped = sum(layer.nnz - num_left[name] for name, layer in layers.items())
        return Update(
            changes, self.next_state(state, num_dropped, sum(layer.nnz for layer in layers.values()))
        )

    def next_state(self, state: State, num_dropped: int, nnz: int) -> State:
        """What the method keeps after an update.

        Args:
            state: before it.
            num_dropped: weights that its drop rule chose.
            nnz: weights of all layers.

        Returns:
            Names and numbers.
        """
        return state


@dataclass(frozen=True)
class SET(DropAndGrow):
    r"""Sparse evolutionary training: drops the smallest weights, and grows as many at random.

    At step :math:`t`, each layer of :math:`k` weights drops its :math:`\lfloor f(t) k \rfloor` smallest
    magnitudes and grows as many, uniformly among all positions that are inactive then.

    Args:
        sparsity: fraction of zeros, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
        drop: fraction :math:`f` of a layer's weights that an update drops, a number or a schedule.
        distribution: spreads the sparsity over layers.

    Raises:
        MisconfigurationException: if an argument is out of its range.

    Example:
        >>> SET(0.9, drop=CosineSchedule(0.3)).num_candidates({"fc": 100}, Moment(step=1, elapsed=1, span=10))
        {}

    References:
        Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity,
        Nature Communications 2018, arXiv:1707.04780.
    """

    sparsity: Sparsity
    drop: Schedule | float = field(default_factory=lambda: CosineSchedule(0.3))
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        _check_sparsities(self, self.sparsity)
        object.__setattr__(self, "drop", as_schedule(self.drop, f"{type(self).__name__}(drop)"))

    @property
    def needs_end(self) -> bool:
        """As the schedule does."""
        return self._drop.needs_end

    @property
    def _drop(self) -> Schedule:
        assert isinstance(self.drop, Schedule)
        return self.drop

    @property
    def drop_rule(self) -> DropFraction:
        """By magnitude."""
        return DropFraction(self._drop)

    @property
    def grow_rule(self) -> GrowRule:
        """At random."""
        return GrowRandom()


@dataclass(frozen=True)
class RigL(SET):
    r"""Rigging the lottery: :class:`SET` that grows where the gradient is largest.

    The dense gradient is needed in the step before an update only, a layer at a time: backward reduces it to
    the largest entries at once. With gradient accumulation, the first backward chooses twice as many
    candidates, and the later ones add to these only.

    Args:
        sparsity: fraction of zeros, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
        drop: fraction of a layer's weights that an update drops, a number or a schedule.
        distribution: spreads the sparsity over layers.

    Raises:
        MisconfigurationException: if an argument is out of its range.

    Example:
        >>> RigL(0.9, drop=0.3).num_candidates({"fc": 100}, Moment(step=1, elapsed=1, span=10))
        {'fc': 30}

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134.
    """

    @property
    def grow_rule(self) -> GrowRule:
        """By gradient."""
        return GrowByGradient()

    def num_candidates(self, nnz: Mapping[str, int], moment: Moment) -> dict[str, int]:
        """As many as are dropped."""
        numbers = {name: self.drop_rule.num_dropped(count, moment) for name, count in nnz.items()}
        return {name: number for name, number in numbers.items() if number}


@dataclass(frozen=True)
class DynamicSparseReparameterization(DropAndGrow):
    r"""Drops what is below one threshold for all layers, and moves weights to the layers that keep most.

    An update drops all :math:`K_l` weights of layer :math:`l` with :math:`|w| < H`, which leaves
    :math:`R_l`. It grows :math:`\sum_i K_i \cdot R_l / \sum_i R_i` in each layer, uniformly among positions
    that were inactive, so that the total stays the same, exactly. Then :math:`H` is halved if more than
    :math:`(1 + \delta) N` were dropped, and doubled if fewer than :math:`(1 - \delta) N`.

    Args:
        sparsity: fraction of zeros at the start, in ``[0, 1)``; or by layer, where ``*`` stands for any text.
            The total stays.
        reallocate: weights to drop per update, :math:`N`: a whole number, or a float as a fraction of all
            nonzero weights. The authors drop 20,000 on WRN-28-2, which is 0.14 at a sparsity of 0.9.
        threshold: :math:`H` at first.
        tolerance: :math:`\delta`, in ``[0, 1)``.
        distribution: spreads the sparsity at the start.

    Raises:
        MisconfigurationException: if an argument is out of its range; at the start of the run, if
            ``reallocate`` is more than all weights.

    Example:
        >>> DynamicSparseReparameterization(0.9).initial_state(nnz=100)
        {'threshold': 0.001}

    References:
        Mostafa and Wang, Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
        Reparameterization, ICML 2019, arXiv:1902.05967.
    """

    sparsity: Sparsity
    reallocate: int | float = 0.14
    threshold: float = 1e-3
    tolerance: float = 0.1
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        _check_sparsities(self, self.sparsity)
        name, number = type(self).__name__, self.reallocate
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or number <= 0 or (isinstance(number, float) and number >= 1):
            raise MisconfigurationException(
                f"`{name}(reallocate)` must be a number of weights, at least 1, or a fraction of all nonzero "
                f"weights as a float in (0, 1), but got reallocate={number!r}. Use e.g. 0.14 or 20000."
            )
        if not 0 < self.threshold < float("inf"):
            raise MisconfigurationException(
                f"`{name}(threshold)` must be greater than 0 and finite, but got "
                f"threshold={self.threshold!r}. Use e.g. 1e-3; it adapts itself."
            )
        if not 0 <= self.tolerance < 1:
            raise MisconfigurationException(
                f"`{name}(tolerance)` must be a fraction in [0, 1), but got tolerance={self.tolerance!r}. "
                "Use e.g. 0.1."
            )

    @property
    def clock(self) -> UpdateClock:
        """Nearly to the end, as the authors do."""
        return UpdateEvery(100, start=0, stop=0.95)

    @property
    def changes_counts(self) -> bool:
        """Weights move between layers."""
        return True

    @property
    def drop_rule(self) -> DropRule:
        """By one threshold."""
        return DropBelowThreshold()

    @property
    def grow_rule(self) -> GrowRule:
        """At random, elsewhere."""
        return GrowRandom(may_return=False)

    @property
    def budget(self) -> Budget:
        """One for all layers."""
        return AcrossLayers()

    def initial_state(self, nnz: int) -> dict[str, float]:
        """The threshold."""
        if self.reallocate > nnz:
            raise MisconfigurationException(
                f"`{type(self).__name__}(reallocate)` must be at most the number of nonzero weights, {nnz} "
                f"here, but got reallocate={self.reallocate}. Give a fraction of them, e.g. 0.14."
            )
        return {"threshold": self.threshold}

    def next_state(self, state: State, num_dropped: int, nnz: int) -> State:
        """Halve or double the threshold if it dropped too many or too few."""
        wanted = self.reallocate * nnz if isinstance(self.reallocate, float) else self.reallocate
        threshold = state["threshold"]
        if num_dropped > (1 + self.tolerance) * wanted:
            threshold /= 2
        elif num_dropped < (1 - self.tolerance) * wanted:
            threshold *= 2
        return {"threshold": threshold}


DSR = DynamicSparseReparameterization


@dataclass(frozen=True)
class GradualMagnitudePruning(SparseMethod):
    r"""Starts dense, and drops the smallest weights until the model is as sparse as wanted; none grow.

    Between the first and the last update, the sparsity is
    :math:`s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / T)^3`. Memory falls as the model becomes sparse, but
    **its peak is that of dense training**, plus the pattern: use it for a small model at the end, not to
    train in little memory.

    Args:
        sparsity: fraction of zeros at the end :math:`s_f`, in ``[0, 1)``; or a schedule from first to last.
        scope: ``"layer"``: each layer is as sparse as the distribution says; ``"global"``: the smallest of
            all layers go, a layer keeps at least one.
        distribution: spreads the sparsity over layers.

    Raises:
        MisconfigurationException: if an argument is out of its range.

    Example:
        >>> method = GradualMagnitudePruning(0.8)
        >>> [round(method.sparsity.value(step, 4), 3) for step in range(5)]
        [0.0, 0.463, 0.7, 0.788, 0.8]

    References:
        Zhu and Gupta, To Prune, or Not to Prune, ICLR Workshop 2018, arXiv:1710.01878.
    """

    sparsity: Schedule | float
    scope: Scope = "layer"
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        argument = f"{type(self).__name__}(sparsity)"
        if not isinstance(self.sparsity, Schedule):
            object.__setattr__(self, "sparsity", CubicSchedule(0.0, check_sparsity(self.sparsity, argument)))
        as_schedule(self.sparsity, argument)
        if self._at(1, 1) < self._at(0, 1):
            raise MisconfigurationException(
                f"`{argument}` must not fall, since nothing grows, but got {self.sparsity!r}. "
                "Exchange begin and end."
            )
        if self.scope not in get_args(Scope):
            raise MisconfigurationException(
                f"`{type(self).__name__}(scope)` must be 'layer' or 'global', but got scope={self.scope!r}. "
                "Use one of them."
            )

    def _at(self, step: int, total: int) -> float:
        assert isinstance(self.sparsity, Schedule)
        return self.sparsity.value(step, total)

    @property
    def changes_counts(self) -> bool:
        """Layers lose weights."""
        return True

    @property
    def needs_end(self) -> bool:
        """As the schedule does."""
        assert isinstance(self.sparsity, Schedule)
        return self.sparsity.needs_end

    @property
    def starts_dense(self) -> bool:
        """Unless the schedule begins elsewhere."""
        return self._at(0, 1) < 0.5

    def counts(self, shapes: Shapes, overrides: Mapping[str, float]) -> dict[str, int]:
        """All weights, as a rule."""
        if overrides:
            raise MisconfigurationException(
                f"`Select(overrides)` cannot be combined with `{type(self).__name__}`, whose sparsity "
                f"changes, but got overrides={dict(overrides)!r}. Leave them out, or use "
                "distribution=ErdosRenyiKernel()."
            )
        return self.distribution.counts(shapes, self._at(0, 1))

    def update(self, layers: Mapping[str, Layer], moment: Moment, state: State) -> Update:
        """Drop what is too much by now."""
        shapes = {name: layer.shape for name, layer in layers.items()}
        target = self.distribution.counts(shapes, self._at(moment.elapsed, moment.span))
        if self.scope == "layer":
            kept = {
                name: smallest(layer.values, max(0, layer.nnz - target[name]))
                for name, layer in layers.items()
            }
        else:
            kept = _smallest_of_all(layers, sum(target.values()))
        return Update(
            {
                name: Change(stays, layers[name].positions.new_empty(0))
                for name, stays in kept.items()
                if not stays.all()
            },
            state,
        )


def _smallest_of_all(layers: Mapping[str, Layer], target: int) -> dict[str, torch.Tensor]:
    """Drop the smallest of all layers, but never the largest of one."""
    magnitudes = [layer.values.abs().clone() for layer in layers.values()]
    for layer in magnitudes:
        layer[layer.argmax()] = float("inf")
    sizes = [layer.numel() for layer in magnitudes]
    kept = smallest(torch.cat(magnitudes), max(0, sum(sizes) - max(target, len(sizes))))
    return dict(zip(layers, kept.split(sizes), strict=True))


def _check_sparsities(method: SparseMethod, sparsity: Any) -> None:
    argument = f"{type(method).__name__}(sparsity)"
    if isinstance(sparsity, Mapping):
        for name, value in sparsity.items():
            check_sparsity(value, f"{argument}[{name!r}]")
        if not sparsity:
            raise MisconfigurationException(
                f"`{argument}` must name layers, but got {{}}. Use e.g. 0.9 for all."
            )
    else:
        check_sparsity(sparsity, argument)
