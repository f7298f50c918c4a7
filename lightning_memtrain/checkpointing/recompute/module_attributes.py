"""Places in modules that hold something: parameters, buffers, and attributes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import is_mutable

TORCH_ATTRIBUTES = frozenset({*nn.Module().__dict__, "forward", "_compiled_call_impl"})
"""Attributes that are torch's own."""
ABSENT: Any = object()
"""What an attribute holds that is not there."""


class ModuleAttribute(NamedTuple):
    """A parameter, buffer, submodule or any other attribute of a module, by name.

    Args:
        module: whose attribute it is.
        kind: in which of its dictionaries: ``"_parameters"``, ``"_buffers"``, ``"_modules"`` or
            ``"__dict__"``.
        name: the key there.
    """

    module: nn.Module
    kind: str
    name: str

    # Metrics compare and hash by what they hold.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModuleAttribute) and self.module is other.module and self[1:] == other[1:]

    def __hash__(self) -> int:
        return hash((id(self.module), *self[1:]))

    @property
    def value(self) -> Any:
        """What it holds; :data:`ABSENT` for nothing."""
        return getattr(self.module, self.kind).get(self.name, ABSENT)

    def assign(self, value: Any) -> None:
        """Let it hold something else."""
        if value is not ABSENT:
            getattr(self.module, self.kind)[self.name] = value
        else:
            getattr(self.module, self.kind).pop(self.name, None)

    def describe(self, root: nn.Module) -> str:
        """For people, e.g. ``"parameter '0.weight'"``.

        Args:
            root: a module around this one.

        Returns:
            What it is, and its path from there.
        """
        kind = {"_parameters": "parameter", "_buffers": "buffer"}.get(self.kind, "attribute")
        path = next(path for path, module in root.named_modules() if module is self.module)
        return f"{kind} {f'{path}.{self.name}'.lstrip('.')!r}"


def attributes_of(modules: Iterable[nn.Module]) -> dict[ModuleAttribute, Any]:
    """What modules hold that is neither of torch's own nor a parameter, a buffer or a module.

    Args:
        modules: any modules.

    Returns:
        The value of each attribute.
    """
    return {
        ModuleAttribute(module, "__dict__", name): value
        for module in modules
        for name, value in module.__dict__.items()
        if name not in TORCH_ATTRIBUTES
    }


def mutable_attributes(modules: Iterable[nn.Module]) -> dict[ModuleAttribute, Any]:
    """Attributes that can be changed without being assigned.

    Args:
        modules: any modules.

    Returns:
        The value of each that holds a tensor, or an object that is looked into.
    """
    return {
        ModuleAttribute(module, "__dict__", name): value
        for module in modules
        for name, value in module.__dict__.items()
        if name not in TORCH_ATTRIBUTES and is_mutable(value)
    }
