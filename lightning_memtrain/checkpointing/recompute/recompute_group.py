"""Modules that are recomputed together, and the segment that their calls go on with."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from lightning_memtrain.checkpointing.recompute.segment import Segment
from lightning_memtrain.core.saved_tensor_hooks import innermost_pack_hook

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes a context for the forward of a call and one for its recomputation."""


class RecomputeGroup:
    """Modules that are recomputed together where one feeds the next.

    Args:
        contexts: contexts for each call; by default none.
    """

    def __init__(self, contexts: Contexts | None = None) -> None:
        self.contexts = contexts
        self._open: _OpenSegment | None = None

    def take_segment(self, position: int, tensors: Collection[Tensor]) -> Segment:
        """The segment that a call goes on with, or a new one; until it is given back, others begin their own.

        A call goes on with the last segment if it comes later in the group than that one's calls, takes
        something that they made, and no checkpoint around them begins or ends in between. So no segment
        reaches into another forward pass, however the last one ended.

        Args:
            position: place of the module in the group.
            tensors: arguments of the call, of any shape and dtype.

        Returns:
            The segment.
        """
        segment = self._open.segment() if self._open is not None and self._open.is_within_reach else None
        self._open = None
        if (
            segment is None
            or segment.calls[-1].target.position >= position
            or all(segment.output_id(tensor) is None for tensor in tensors)
        ):
            return Segment()
        return segment

    def give_back(self, segment: Segment) -> None:
        """Let the next call go on with a segment."""
        hook = innermost_pack_hook()
        reference: Callable[[], Any] | None
        try:
            reference = weakref.ref(hook) if hook is not None else None
        except TypeError:  # it is part of Python, which lives on anyway
            reference = functools.partial(_as_it_is, hook)
        self._open = _OpenSegment(weakref.ref(segment), reference)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # a copy begins anew


class _OpenSegment(NamedTuple):
    """A segment that calls may go on with while the same hook for saved tensors is in force."""

    segment: weakref.ref[Segment]
    hook: Callable[[], Any] | None

    @property
    def is_within_reach(self) -> bool:
        hook = innermost_pack_hook()
        return hook is None if self.hook is None else hook is not None and self.hook() is hook


def _as_it_is(value: Any) -> Any:
    return value
