"""Twins of the objects that a call found, for each time that it runs again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_memtrain.checkpointing.recompute.copies_before_writes import copied, version_of
from lightning_memtrain.checkpointing.recompute.objects.content_adapters import Fixed
from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import Found, Objects


class Copies:
    """Copies of tensors for one run: one for each tensor, wherever it is found."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def of(self, before: Tensor, requires_grad: bool) -> Tensor:
        """A copy that may be written to."""
        if id(before) not in self._made:
            self._made[id(before)] = copied(before, requires_grad)
        return self._made[id(before)]


class _Written(NamedTuple):
    """A tensor that the call writes to, as it was before."""

    before: Tensor
    requires_grad: bool


class TwinMaker:
    """Makes objects that hold what others held when a call began.

    The others are left alone, so what counts in them has counted once, and nothing holds them: users' objects
    may come to hold what the call returns, whose graph holds the call.

    Args:
        objects: what each object held.
        roots: where they are needed, each with what was there.
        before: by number, tensors that the call has written to, as they were.
    """

    def __init__(
        self,
        objects: Objects,
        roots: Mapping[Any, Any],
        before: Mapping[int, Tensor],
    ) -> None:
        self._versions: list[tuple[Any, Tensor, int]] = []
        self._found: dict[int, list[Found]] = {}
        self.roots = roots
        """Where twins are needed."""
        if not roots:
            return
        places = {id(tensor): place for place, tensor in objects.tensors}
        found = objects.within(roots.values())
        # An empty one of its class stands for each object.
        empty: dict[int, Any] = {}
        for one in found:
            if id(one.value) not in empty:
                empty[id(one.value)] = _empty(one)

        def kept(held: Any) -> Any:
            if not isinstance(held, Tensor):
                return empty.get(id(held), held)
            if id(held) in before:
                return _Written(before[id(held)], held.requires_grad)
            self._versions.append((places.get(id(held)), held, version_of(held)))
            return held

        for one in found:
            value = empty[id(one.value)]
            if value is not one.value:
                contents = objects.swapped(one, kept)
                self._found.setdefault(id(value), []).append(Found(value, one.part, contents))
        self.roots = {root: empty.get(id(value), value) for root, value in roots.items()}

    @property
    def outdated(self) -> list[Any]:
        """Where the tensors are that twins would hold, if they were written to since."""
        return [place for place, tensor, version in self._versions if version_of(tensor) != version]

    def twins(self, copies: Copies) -> dict[Any, Any]:
        """Make twins, which may be changed.

        Args:
            copies: of tensors, for the same run.

        Returns:
            One for each root.
        """
        if not self.roots:
            return {}
        swap = partial(self._twin, made={}, copies=copies)
        return {root: swap(value) for root, value in self.roots.items()}

    def _twin(self, held: Any, made: dict[int, Any], copies: Copies) -> Any:
        # No function within `twins`, which would hold itself and all that was made until a collection.
        if isinstance(held, _Written):
            return copies.of(*held)
        several = self._found.get(id(held))
        if several is None:
            return held
        if id(held) not in made:
            made[id(held)] = held if isinstance(several[0].part, Fixed) else _empty(several[0])
            swap = partial(self._twin, made=made, copies=copies)
            for one in several:
                made[id(held)] = one.part.filled(made[id(held)], one.part.swapped(one.contents, swap))
        return made[id(held)]


def _empty(one: Found) -> Any:
    try:
        return one.part.empty(one.value, one.contents)
    except TypeError:  # only its own package can make one, so it stays
        return one.value
