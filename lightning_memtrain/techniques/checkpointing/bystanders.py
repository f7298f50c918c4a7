"""Attributes that a forward leaves alone in its first call, and may change in a later one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from lightning_memtrain.techniques.checkpointing.slots import (
    ABSENT,
    NOT_FORWARDS,
    Slot,
    has_changed,
    shallow_copy,
)
from lightning_memtrain.techniques.checkpointing.writes import version_of


class Bystanders:
    """All attributes when a call begins, to tell those that it changes though no call before it did.

    Attributes are compared by identity, module by module, which takes about a microsecond for each.

    Args:
        modules: the module that is called, and those within it.
        holders: the attributes that hold a tensor or a container, and can be changed without being assigned.
    """

    def __init__(self, modules: Sequence[nn.Module], holders: Collection[Slot]) -> None:
        self._found = [(module, module.__dict__.copy()) for module in modules]
        self._holders = [(slot, slot.value) for slot in holders]
        # Each object once: a configuration is in many modules.
        held = {id(value): value for _, value in self._holders}.values()
        self._containers = [(value, shallow_copy(value)) for value in held if not isinstance(value, Tensor)]
        self._tensors = [(value, version_of(value)) for value in held if isinstance(value, Tensor)]

    def changed(self, known: Collection[Slot]) -> tuple[dict[Slot, Any], list[Slot]]:
        """What the call has changed beside what is known to change.

        Args:
            known: attributes that earlier calls changed.

        Returns:
            What each attribute held that was assigned, or whose container was changed; and attributes whose
            tensor was written to in place, so that what it held is lost.
        """
        before: dict[Slot, Any] = {}
        for module, found in self._found:
            now = module.__dict__
            if now.keys() == found.keys() and all(map(is_, now.values(), found.values())):
                continue
            for name in (found.keys() | now.keys()) - NOT_FORWARDS:
                if found.get(name, ABSENT) is not now.get(name, ABSENT):
                    before[Slot(module, "__dict__", name)] = found.get(name, ABSENT)
        contents = {id(value): inside for value, inside in self._containers}
        moved = {id(value) for value, inside in self._containers if has_changed(value, inside, value)}
        moved |= {id(value) for value, version in self._tensors if version_of(value) != version}
        lost = []
        for slot, value in self._holders:
            if isinstance(value, Tensor):
                if id(value) in moved:
                    lost.append(slot)
            elif slot in before or id(value) in moved:
                before[slot] = contents[id(value)]
        return {slot: value for slot, value in before.items() if slot not in known}, lost
