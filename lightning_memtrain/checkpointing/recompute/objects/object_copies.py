"""Copies of the objects that a call found, new ones for each time that it runs again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_memtrain.checkpointing.recompute.objects.content_adapters import ImmutableAdapter
from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import (
    ObjectContents,
    ReachableObjects,
)
from lightning_memtrain.tracing.inplace_writes import version_of


def writable_copy(tensor: Tensor, requires_grad: bool) -> Tensor:
    """A copy that may be written to.

    Args:
        tensor: what to copy, of any shape and dtype.
        requires_grad: whether the copy needs a gradient.

    Returns:
        The copy, with the same shape and dtype; it is no leaf, which may not be written to.
    """
    return tensor.detach().requires_grad_(requires_grad).clone()


class TensorCopies:
    """Copies of tensors for one run: one for each tensor, wherever it is found."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def of(self, before: Tensor, requires_grad: bool) -> Tensor:
        """A copy that may be written to, with the same shape and dtype."""
        if id(before) not in self._made:
            self._made[id(before)] = writable_copy(before, requires_grad)
        return self._made[id(before)]


class _WrittenTensor(NamedTuple):
    """A tensor that the call writes to, as it was before."""

    before: Tensor
    requires_grad: bool


class ObjectCopier:
    """Makes objects that hold what others held when a call began.

    The others are left alone, so what counts in them has counted once, and nothing holds them: users' objects
    may come to hold what the call returns, whose graph holds the call.

    Args:
        objects: what each object held.
        roots: where they are needed, each with what was there.
        before: by number, tensors that the call has written to, as they were, in the same shapes and dtypes.
    """

    def __init__(
        self,
        objects: ReachableObjects,
        roots: Mapping[Any, Any],
        before: Mapping[int, Tensor],
    ) -> None:
        self._versions: list[tuple[Any, Tensor, int]] = []
        self._found: dict[int, list[ObjectContents]] = {}
        self.roots = roots
        """Where copies are needed."""
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
                return _WrittenTensor(before[id(held)], held.requires_grad)
            self._versions.append((places.get(id(held)), held, version_of(held)))
            return held

        for one in found:
            value = empty[id(one.value)]
            if value is not one.value:
                contents = objects.replaced(one, kept)
                self._found.setdefault(id(value), []).append(ObjectContents(value, one.adapter, contents))
        self.roots = {root: empty.get(id(value), value) for root, value in roots.items()}

    @property
    def outdated(self) -> list[Any]:
        """Where the tensors are that copies would hold, if they were written to since."""
        return [place for place, tensor, version in self._versions if version_of(tensor) != version]

    def object_copies(self, copies: TensorCopies) -> dict[Any, Any]:
        """Copy the objects, so that the copies may be changed.

        Args:
            copies: of tensors, for the same run.

        Returns:
            One for each root.
        """
        if not self.roots:
            return {}
        replace = partial(self._copy, made={}, copies=copies)
        return {root: replace(value) for root, value in self.roots.items()}

    def _copy(self, held: Any, made: dict[int, Any], copies: TensorCopies) -> Any:
        # No function within `object_copies`: it would hold itself and all that was made until a collection.
        if isinstance(held, _WrittenTensor):
            return copies.of(*held)
        several = self._found.get(id(held))
        if several is None:
            return held
        if id(held) not in made:
            made[id(held)] = held if isinstance(several[0].adapter, ImmutableAdapter) else _empty(several[0])
            replace = partial(self._copy, made=made, copies=copies)
            for one in several:
                made[id(held)] = one.adapter.fill(made[id(held)], one.adapter.replaced(one.contents, replace))
        return made[id(held)]


def _empty(one: ObjectContents) -> Any:
    try:
        return one.adapter.new_empty(one.value, one.contents)
    except TypeError:  # only its own package can make one, so it stays
        return one.value
