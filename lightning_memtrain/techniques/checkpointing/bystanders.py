"""Attributes that a forward leaves alone in its first call, and may assign in a later one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

from torch import nn

from lightning_memtrain.techniques.checkpointing.slots import ABSENT, NOT_FORWARDS, Slot


class Bystanders:
    """All attributes when a call begins, to tell those that it assigns though no call before it did.

    They are compared by identity, module by module, which takes about a microsecond for each.

    Args:
        modules: the module that is called, and those within it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._found = [(module, module.__dict__.copy()) for module in modules]

    def assigned(self, known: Collection[Slot]) -> dict[Slot, Any]:
        """What the call has assigned beside what is known to be assigned.

        Args:
            known: attributes that earlier calls assigned.

        Returns:
            What each attribute held before.
        """
        before: dict[Slot, Any] = {}
        for module, found in self._found:
            now = module.__dict__
            if now.keys() == found.keys() and all(map(is_, now.values(), found.values())):
                continue
            for name in (found.keys() | now.keys()) - NOT_FORWARDS:
                if found.get(name, ABSENT) is not now.get(name, ABSENT):
                    before[Slot(module, "__dict__", name)] = found.get(name, ABSENT)
        return {slot: value for slot, value in before.items() if slot not in known}
