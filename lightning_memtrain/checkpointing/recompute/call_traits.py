"""What the forward of a module changes, known once it has run."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_memtrain.checkpointing.recompute.module_attributes import ModuleAttribute
from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import ReachableObjects


class CallTraits(NamedTuple):
    """What a forward is known to do; by default nothing is known.

    Args:
        is_new: whether it has not run yet.
        written: what it writes to in place: places of arguments, attributes of modules, paths within these.
        seen: where attributes and objects held tensors when it was watched, and how many attributes did.
        assigned: which attributes and submodules it assigns.
        given_other_data: which parameters it gives other data.
        changed_for_a_while: within which attributes it changes something for a while.
        draws_from_numpy: whether it draws random numbers there, whose state takes long to read.
        writes_after_save: whether it writes to tensors after autograd has saved them.
        runs_own_backward: whether it runs a backward of its own, which needs what was saved so far.
    """

    is_new: bool = True
    written: frozenset[Any] = frozenset()
    seen: frozenset[Any] = frozenset()
    assigned: frozenset[ModuleAttribute] = frozenset()
    given_other_data: frozenset[ModuleAttribute] = frozenset()
    changed_for_a_while: frozenset[ModuleAttribute] = frozenset()
    draws_from_numpy: bool = True
    writes_after_save: bool = False
    runs_own_backward: bool = True

    def cover(self, objects: ReachableObjects) -> bool:
        """Whether it is known of all that is there whether forward changes it."""
        return not self.is_new and all(one in self.seen for one in objects.looked_at)

    @property
    def writes_to_attributes(self) -> bool:
        """Whether it writes to tensors that are neither arguments, parameters nor buffers."""
        return any(isinstance(key, ModuleAttribute) and key.kind == "__dict__" for key in self.written)
