"""What a call finds assigned in its modules, to tell what it assigns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from lightning_memtrain.checkpointing.recompute.module_attributes import (
    ABSENT,
    TORCH_ATTRIBUTES,
    ModuleAttribute,
)

_REGISTERED = ("_parameters", "_buffers")


class UnexpectedAssignments:
    """All attributes and submodules when a call begins, to tell what it assigns though no call before it did.

    They are compared by identity, module by module, which takes one or two microseconds for each.

    Args:
        modules: the module that is called, and those within it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._found = [
            (one, one.__dict__.copy(), one._modules.copy(), _sizes(one))
            for one in modules
            if not isinstance(one, torch.jit.ScriptModule)  # holds everything out of reach
        ]

    def assigned(self, known: Collection[ModuleAttribute] = ()) -> dict[ModuleAttribute, Any]:
        """What was assigned since, beside what is known to be assigned.

        Parameters and buffers that were there are not looked at, for they are set back anyway.

        Args:
            known: attributes that earlier calls assigned.

        Returns:
            What each attribute held before.
        """
        before: dict[ModuleAttribute, Any] = {}
        for module, attributes, submodules, sizes in self._found:
            for name in _differences(attributes, module.__dict__):
                if name not in TORCH_ATTRIBUTES:
                    before[ModuleAttribute(module, "__dict__", name)] = attributes.get(name, ABSENT)
            for name in _differences(submodules, module._modules):
                before[ModuleAttribute(module, "_modules", name)] = submodules.get(name, ABSENT)
            if _sizes(module) != sizes:
                for kind, size in zip(_REGISTERED, sizes, strict=True):
                    for name in [*getattr(module, kind)][size:]:
                        before[ModuleAttribute(module, kind, name)] = ABSENT
        return {attribute: value for attribute, value in before.items() if attribute not in known}


def _sizes(module: nn.Module) -> tuple[int, int]:
    return len(module._parameters), len(module._buffers)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if now.keys() == before.keys() and all(map(is_, now.values(), before.values())):
        return
    for name in before.keys() | now.keys():
        if before.get(name, ABSENT) is not now.get(name, ABSENT):
            yield name
