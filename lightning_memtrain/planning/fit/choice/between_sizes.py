"""Chains of sizes that were not traced, from those of two sizes that were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from lightning_memtrain.checkpointing.selection.step_chain import ChainStage

_BYTES = [field.name for field in fields(ChainStage) if field.name.endswith("_bytes")]
_SECONDS = [field.name for field in fields(ChainStage) if field.name.endswith("seconds")]


def alike(one: Sequence[ChainStage], other: Sequence[ChainStage]) -> bool:
    """Whether two chains have the same stages.

    Args:
        one: a chain.
        other: another one.

    Returns:
        Whether names and parts agree.
    """
    return len(one) == len(other) and all(
        a.name == b.name and alike(a.parts, b.parts) for a, b in zip(one, other, strict=True)
    )


def between(low: Sequence[ChainStage], high: Sequence[ChainStage], place: float) -> tuple[ChainStage, ...]:
    """A chain on the straight line through two others, since every tensor has so many bytes for a sample.

    Args:
        low: the chain at 0.
        high: that at 1, :func:`alike`.
        place: where on the line; beyond the ends it goes on.

    Returns:
        The chain.
    """
    return tuple(_stage(a, b, place) for a, b in zip(low, high, strict=True))


def on_line(low: float, high: float, place: float) -> float:
    """A number on the straight line through two others, not below 0.

    Args:
        low: the number at 0.
        high: that at 1.
        place: where on the line.

    Returns:
        The number.
    """
    return max(0.0, low + (high - low) * place)


def _stage(low: ChainStage, high: ChainStage, place: float) -> ChainStage:
    values: dict[str, float] = {
        name: math.ceil(on_line(getattr(low, name), getattr(high, name), place)) for name in _BYTES
    }
    values |= {name: on_line(getattr(low, name), getattr(high, name), place) for name in _SECONDS}
    return ChainStage(name=low.name, parts=between(low.parts, high.parts, place), **values)  # type: ignore[arg-type]
