"""The policy that names segments: what a planner has chosen, written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_memtrain.checkpointing.policies import Groups, Modules, RecomputationPolicy, Recomputed
from lightning_memtrain.core import ArgumentError


@dataclass(frozen=True)
class Segments(RecomputationPolicy):
    """Recomputes the modules that are named, some of them together.

    Of modules that are recomputed together only the input of the first one is kept, where each takes what the
    one before it returned.

    Args:
        segments: lists of module paths, those of one list recomputed together.

    Raises:
        ArgumentError: if it is no list of lists of paths; at the start of the fit, if the model
            has no such module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> Segments([["0", "1"]]).groups(model)
        [[Recomputed(name='0', path=()), Recomputed(name='1', path=())]]
    """

    segments: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        given = self.segments
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(map(_is_segment, given)):
            raise ArgumentError(
                "`Segments(segments)` must be a list of lists of module paths, but got "
                f"segments={given!r}. Write e.g. Segments([['encoder.layer.0', 'encoder.layer.1']])."
            )
        object.__setattr__(self, "segments", tuple(map(tuple, given)))

    def groups(self, model: nn.Module) -> Groups:
        """Every segment is a group."""
        for name in (name for segment in self.segments for name in segment):
            if name not in dict(model.named_modules(remove_duplicate=False)):
                Modules([name]).groups(model)  # refuses it, with the nearest name
        return [[Recomputed(name) for name in segment] for segment in self.segments]


def _is_segment(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return len(value) > 0 and all(isinstance(name, str) for name in value)
