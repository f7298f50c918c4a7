"""What a method of sparse training says: how sparse each layer is, and which weights it has at what time."""

# Without postponed annotations: for arguments from YAML, those of a base are looked up in its heirs' modules.
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_kinds
from lightning_memtrain.sparsity.methods.distributions import (
    Distribution,
    Shapes,
    check_sparsity,
)
from lightning_memtrain.sparsity.methods.rules.layer_updates import (
    LayerChange,
    LayerView,
    MethodState,
    UpdateTime,
)
from lightning_memtrain.sparsity.methods.update_schedules import UpdateEvery, UpdateSchedule, UpdateSteps

Sparsity = float | dict[str, float]


@dataclass(frozen=True)
class PatternUpdate:
    """What a method wants of one update: changes of layers, and what it keeps itself.

    Args:
        changes: by layer.
        state: of the method, from now on.
    """

    changes: Mapping[str, LayerChange]
    state: MethodState = field(default_factory=dict)


class SparseMethod(ABC):
    """Says how sparse each layer is, and which weights it has at what time.

    Methods hold no state: an update is a function of the layers, the time and what the method said before.
    """

    #: What was asked for; a run is resumed at the same only.
    sparsity: Any
    #: How it is spread over layers; likewise.
    distribution: Distribution

    @property
    def default_update(self) -> UpdateSchedule | None:
        """When the pattern changes unless a user says so; ``None`` for never."""
        return UpdateEvery(100, start=0, stop=0.75)

    @property
    def changes_nnz(self) -> bool:
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

    def schedule_length(self, update_steps: UpdateSteps) -> int:
        """Steps from the start of schedules to their end: as in the papers, the time that updates have.

        The last update is before that, as a rule, so that it still does something.

        Args:
            update_steps: when updates are due.

        Returns:
            0 if there is no end.
        """
        return 0 if update_steps.stop is None else max(0, update_steps.stop - update_steps.start)

    def update_time(self, step: int, update_steps: UpdateSteps, seed: int = 0) -> UpdateTime:
        """When an update is, as its rules count the time.

        Args:
            step: optimizer steps completed.
            update_steps: when updates are due.
            seed: of the run.

        Returns:
            The time since schedules began, and until they end.
        """
        return UpdateTime(step, step - update_steps.start, self.schedule_length(update_steps), seed)

    def has_effect(self, nnz: Mapping[str, int], now: UpdateTime) -> bool:
        """Whether an update can change anything.

        Args:
            nnz: weights by layer.
            now: of the update.

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

    def num_candidates(self, nnz: Mapping[str, int], now: UpdateTime) -> dict[str, int]:
        """Inactive positions with the largest gradients that an update has to know.

        Args:
            nnz: weights by layer.
            now: of the update.

        Returns:
            Numbers by layer; empty if gradients do not matter.
        """
        return {}

    @abstractmethod
    def update(self, layers: Mapping[str, LayerView], now: UpdateTime, state: MethodState) -> PatternUpdate:
        """Choose what one update drops and grows.

        Args:
            layers: by name, in the order of the model.
            now: when.
            state: what :meth:`initial_state` or the update before returned.

        Returns:
            Changes of layers, and the new state.
        """


def check_sparsities(method: SparseMethod, sparsity: Any) -> None:
    """Refuse what is neither a fraction of zeros nor fractions by layer.

    Args:
        method: whose argument it is.
        sparsity: what a user gave.

    Raises:
        ArgumentError: naming the argument.
    """
    expected, cure = "a Distribution", "Use e.g. Uniform() or ErdosRenyiKernel()."
    check_kinds(type(method).__name__, Distribution, expected, cure, distribution=method.distribution)
    argument = f"{type(method).__name__}(sparsity)"
    if isinstance(sparsity, Mapping):
        for name, value in sparsity.items():
            if not isinstance(name, str):
                raise ArgumentError(
                    f"`{argument}` must map names of layers to fractions of zeros, but got the name "
                    f"{name!r}. Write e.g. {{'head': 0.5}}."
                )
            check_sparsity(value, f"{argument}[{name!r}]")
        if not sparsity:
            raise ArgumentError(f"`{argument}` must name layers, but got {{}}. Use e.g. 0.9 for all.")
    else:
        check_sparsity(sparsity, argument)


def check_method(owner: str, method: Any) -> None:
    """Refuse what is no method.

    Args:
        owner: what the user has called.
        method: the argument.

    Raises:
        ArgumentError: naming the argument.
    """
    expected = "a method such as RigL(0.9)"
    check_kinds(owner, SparseMethod, expected, "Use one.", method=method)
