"""What a choice of what to recompute depends on, and when steps have left what it was made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from torch import nn

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of a batch's tensors, in order."""

# Without a limit, a batch or optimizer state that is this much larger is chosen for anew.
_NOTABLY_LARGER = 1.1


@dataclass(frozen=True)
class StepConditions:
    """One step.

    Args:
        shapes: of the batch's tensors.
        batch_bytes: of the batch.
        gradient_bytes: of gradients that are there at the start.
        state_bytes: of the optimizers' state.
        trained: which parameters are trained, by ``id``.
        parameter_bytes: of all parameters.
        held_bytes: of all that is held from step to step beside batch and state; 0 if there is no limit.
    """

    shapes: Shapes
    batch_bytes: int
    gradient_bytes: int
    state_bytes: int
    trained: frozenset[int]
    parameter_bytes: int
    held_bytes: int = 0

    def beyond(self, planned_for: StepConditions, *, exactly: bool) -> str:
        """What there is more of now but for the batch's shape, for people; nothing if there is not.

        Args:
            planned_for: the step, or steps, that was chosen for.
            exactly: whether a byte more counts, as under a limit, or only what is notably larger.

        Returns:
            E.g. ``", with more optimizer state"``.
        """
        least = 1.0 if exactly else _NOTABLY_LARGER
        if not exactly and self.batch_bytes > least * planned_for.batch_bytes:
            return ", for a larger batch"
        if self.gradient_bytes > least * planned_for.gradient_bytes:
            return ", with gradients that are there in forward"
        if self.state_bytes > least * planned_for.state_bytes:
            return ", with more optimizer state"
        if self.trained - planned_for.trained:
            return ", with more parameters that are trained"
        if self.parameter_bytes > least * planned_for.parameter_bytes:
            return ", with more parameters"
        return ""

    def at_least(self, state_bytes: int, gradient_bytes: int) -> StepConditions:
        """The same with at least so much, as the steps to come will have it."""
        return replace(
            self,
            state_bytes=max(self.state_bytes, state_bytes),
            gradient_bytes=max(self.gradient_bytes, gradient_bytes),
        )

    def joined(self, other: StepConditions) -> StepConditions:
        """The most of both, for the batch of this one, and what is held now."""
        return replace(
            self,
            batch_bytes=max(self.batch_bytes, other.batch_bytes),
            gradient_bytes=max(self.gradient_bytes, other.gradient_bytes),
            state_bytes=max(self.state_bytes, other.state_bytes),
            trained=self.trained | other.trained,
            parameter_bytes=max(self.parameter_bytes, other.parameter_bytes),
        )


def trained_parameters(model: nn.Module) -> frozenset[int]:
    """The parameters of a model that need gradients, by ``id``."""
    return frozenset(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


class FittingShapes:
    """The shapes of batches that are known to stay within a limit under the choice in force."""

    def __init__(self) -> None:
        self._known: list[Shapes] = []

    def add(self, shapes: Shapes) -> None:
        """Note that a batch of these shapes was counted and fits."""
        self._known = [one for one in self._known if not _is_within(one, shapes)]
        self._known.append(shapes)

    def contains(self, shapes: Shapes) -> bool:
        """Whether a batch is no larger than one that fits, in any of its dimensions."""
        return any(_is_within(shapes, known) for known in self._known)

    def growth(self, shapes: Shapes) -> float:
        """How many times more than for one that fits a step may hold for a batch, at most.

        Activations grow with each dimension, those of attention with its square. Where a dimension has
        shrunk, that is not counted.

        Args:
            shapes: of the batch.

        Returns:
            The least such number over all that fit, at least 1; infinity if none is of the same structure.
        """
        return min((_growth(shapes, known) for known in self._known), default=float("inf"))


def _alike(one: Shapes, other: Shapes) -> bool:
    return [len(shape) for shape in one] == [len(shape) for shape in other]


def _pairs(one: Shapes, other: Shapes) -> list[tuple[int, int]]:
    return [
        (size, known)
        for shape, known_shape in zip(one, other, strict=True)
        for size, known in zip(shape, known_shape, strict=True)
    ]


def _is_within(one: Shapes, other: Shapes) -> bool:
    return _alike(one, other) and all(size <= known for size, known in _pairs(one, other))


def _growth(shapes: Shapes, known: Shapes) -> float:
    if not _alike(shapes, known):
        return float("inf")
    grown = {
        (size, old) for size, old in _pairs(shapes, known) if size > old
    }  # a dimension of several counts once
    if any(old == 0 for _, old in grown):
        return float("inf")
    return prod(size / old for size, old in grown) ** 2
