"""Methods of sparse training, each composed of a rule to drop, a rule to grow and a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.sparsity.methods.distributions import (
    Distribution,
    Shapes,
    Uniform,
    check_sparsity,
    planned_counts,
)
from lightning_memtrain.sparsity.methods.rules.layer_updates import (
    Budget,
    Change,
    DropFraction,
    DropRule,
    GrowByGradient,
    GrowRandom,
    GrowRule,
    Layer,
    Moment,
    PerLayer,
    State,
)
from lightning_memtrain.sparsity.methods.update_schedules import Ticks, UpdateClock, UpdateEvery
from lightning_memtrain.sparsity.methods.value_schedules import CosineSchedule, Schedule, as_schedule

Sparsity = float | dict[str, float]


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

    #: What was asked for; a run is resumed at the same only.
    sparsity: Any
    #: How it is spread over layers; likewise.
    distribution: Distribution

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
        """Whether updates depend on when they end."""
        return False

    @property
    def starts_dense(self) -> bool:
        """Whether the first steps need as much memory as dense training."""
        return False

    def span(self, ticks: Ticks) -> int:
        """Steps from the start of schedules to their end: as in the papers, the time that updates have.

        The last update is before that, as a rule, so that it still does something.

        Args:
            ticks: when updates are due.

        Returns:
            0 if there is no end.
        """
        return 0 if ticks.stop is None else max(0, ticks.stop - ticks.start)

    def has_effect(self, nnz: Mapping[str, int], moment: Moment) -> bool:
        """Whether an update can change anything.

        Args:
            nnz: weights by layer.
            moment: of the update.

        Returns:
            ``False`` only where it is sure.
        """
        return True

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
        check_sparsities(self, self.sparsity)

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
        check_sparsities(self, self.sparsity)
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

    def has_effect(self, nnz: Mapping[str, int], moment: Moment) -> bool:
        """Unless all fractions of layers are less than one weight."""
        return any(self.drop_rule.num_dropped(count, moment) for count in nnz.values())


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


def check_sparsities(method: SparseMethod, sparsity: Any) -> None:
    """Refuse what is neither a fraction of zeros nor fractions by layer.

    Args:
        method: whose argument it is.
        sparsity: what a user gave.

    Raises:
        MisconfigurationException: naming the argument.
    """
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
