"""What the forward of a module changes, known once it has run."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_memtrain.checkpointing.recompute.module_attributes import Slot
from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import Objects


class Habits(NamedTuple):
    """What a forward is known to do; by default nothing is known.

    Args:
        is_new: whether it has not run yet.
        written: what it writes to in place: places of arguments, slots of modules, and places within these.
        watched: where attributes and objects held tensors when it was watched, and how many attributes did.
        assigned: which attributes and submodules it assigns.
        swapped: which parameters it gives other data.
        passing: within which attributes it changes something for a while.
        draws_from_numpy: whether it draws random numbers there, whose state takes long to read.
        fills_what_is_saved: whether it writes to tensors after autograd has saved them.
        looks_back: whether it runs a backward of its own, which needs what was saved so far.
    """

    is_new: bool = True
    written: frozenset[Any] = frozenset()
    watched: frozenset[Any] = frozenset()
    assigned: frozenset[Slot] = frozenset()
    swapped: frozenset[Slot] = frozenset()
    passing: frozenset[Slot] = frozenset()
    draws_from_numpy: bool = True
    fills_what_is_saved: bool = False
    looks_back: bool = True

    def know(self, objects: Objects) -> bool:
        """Whether it is known of all that is there whether forward changes it."""
        return not self.is_new and all(one in self.watched for one in objects.looked_at)

    @property
    def write_to_attributes(self) -> bool:
        """Whether it writes to tensors that are neither arguments, parameters nor buffers."""
        return any(isinstance(key, Slot) and key.kind == "__dict__" for key in self.written)
