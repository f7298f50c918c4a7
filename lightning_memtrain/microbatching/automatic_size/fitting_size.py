"""What a size was chosen for, and whether it holds for another batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import nn

Shapes = tuple[tuple[int, ...], ...]


class BatchConditions(NamedTuple):
    """What the memory of a batch depends on, beside the size of its chunks.

    Args:
        num_samples: of the whole batch.
        shapes: of its tensors, by sample where samples are known to lie along the first axis.
        batch_bytes: of the whole batch, on the device.
        trained: which parameters are trained, as bits of a number in the order of the model.
        accumulating: whether gradients of earlier batches may be there.
        held_bytes: all that is within reach between two batches, but for gradients, and what is copied of it.
        update: see :func:`~.update_forecast.update_signature`.
    """

    num_samples: int
    shapes: Shapes
    batch_bytes: int
    trained: int
    accumulating: bool
    held_bytes: int
    update: str


class FittingSize(NamedTuple):
    """A size that fits, and all that is known of it.

    Args:
        size: most samples per chunk.
        peak_bytes: the most that a batch holds with it; ``None`` if it is only hoped to fit.
        limit_bytes: what there was room for.
        growing_bytes: the part of that which grows with the shapes of samples.
        kept_bytes: what each chunk leaves behind until the batch is over.
        coming_bytes: the part of the peak that is optimizer state to be made yet.
        updates: signatures of optimizer steps that were looked at.
        made_for: the batch that it was found with.
    """

    size: int
    peak_bytes: int | None
    limit_bytes: int
    growing_bytes: int
    kept_bytes: int
    coming_bytes: int
    updates: tuple[str, ...]
    made_for: BatchConditions

    def holds_for(self, now: BatchConditions, limit_bytes: int | None) -> bool:
        """Whether a batch is sure to fit in chunks of this size.

        Args:
            now: the batch.
            limit_bytes: bytes that may be used in all; ``None`` for what there was room for then.

        Returns:
            ``False`` also if it is not known.
        """
        then = self.made_for
        if now.trained & ~then.trained or now.accumulating > then.accumulating:
            return False
        if now.update not in self.updates:
            return False
        if self.size >= then.num_samples < now.num_samples:
            return False  # it was the batch that ended there, and one chunk finds no gradients of another
        growth = shape_growth(now.shapes, then.shapes)
        if self.peak_bytes is None:
            return growth == 1
        more_chunks = max(0, -(-now.num_samples // self.size) - -(-then.num_samples // self.size))
        more_bytes = (
            max(0, now.batch_bytes - then.batch_bytes)
            + max(0, now.held_bytes - then.held_bytes - self.coming_bytes)
            + more_chunks * self.kept_bytes
        )
        most_bytes = self.limit_bytes if limit_bytes is None else limit_bytes
        return self.peak_bytes + more_bytes + self.growing_bytes * (growth - 1) <= most_bytes

    def lacks(self, now: BatchConditions) -> str:
        """What is new about a batch, for people.

        Args:
            now: a batch for which this does not hold.

        Returns:
            E.g. ``", with more parameters in training"``.
        """
        then = self.made_for
        if now.trained & ~then.trained:
            return ", with more parameters in training"
        if now.accumulating > then.accumulating:
            return ", with gradients of earlier batches"
        if now.update not in self.updates:
            return ", with another step of the optimizer"
        if now.num_samples > then.num_samples or shape_growth(now.shapes, then.shapes) > 1:
            return ", for a larger batch"
        return ", with more that is kept from batch to batch"

    def to_list(self) -> list[Any]:
        """Plain values, for a checkpoint."""
        return [*self[:-1], list(self.made_for)]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> FittingSize:
        """The inverse of :meth:`to_list`."""
        found = cls._make([*values[:-1], BatchConditions._make(values[-1])])
        # Some formats know no tuples.
        shapes = tuple(tuple(shape) for shape in found.made_for.shapes)
        return found._replace(updates=tuple(found.updates), made_for=found.made_for._replace(shapes=shapes))


def trained_parameters(model: nn.Module) -> int:
    """The parameters of a model that need gradients, as bits of a number in the order of the model."""
    return sum(1 << place for place, parameter in enumerate(model.parameters()) if parameter.requires_grad)


def shape_growth(shapes: Shapes, known: Shapes) -> float:
    """How many times more than for a known batch may be held for the samples of another, at most.

    Activations grow with each dimension, those of attention with its square. What has shrunk is not counted.
    """
    if shapes == known:
        return 1.0
    if [len(shape) for shape in shapes] != [len(shape) for shape in known]:
        return float("inf")
    pairs = {
        (size, old)  # a dimension that several tensors share counts once
        for shape, known_shape in zip(shapes, known, strict=True)
        for size, old in zip(shape, known_shape, strict=True)
        if size > old
    }
    if any(old == 0 for _, old in pairs):
        return float("inf")
    return float(prod(size / old for size, old in pairs) ** 2)
