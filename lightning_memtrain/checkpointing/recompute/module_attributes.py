"""Places in modules that hold something: parameters, buffers, and attributes."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import holds_what_changes

_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, Counter, deque)
NOT_FORWARDS = frozenset({*nn.Module().__dict__, "forward", "_compiled_call_impl"})
"""Attributes that are torch's own."""
ABSENT: Any = object()
"""What a slot holds that holds nothing."""


class Slot(NamedTuple):
    """A place in a module that holds something.

    Args:
        module: whose place it is.
        kind: in which of its dictionaries: ``"_parameters"``, ``"_buffers"`` or ``"__dict__"``.
        name: the key there.
    """

    module: nn.Module
    kind: str
    name: str

    # Metrics compare and hash by what they hold.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and self.module is other.module and self[1:] == other[1:]

    def __hash__(self) -> int:
        return hash((id(self.module), *self[1:]))

    @property
    def value(self) -> Any:
        """What it holds; :data:`ABSENT` for nothing."""
        return getattr(self.module, self.kind).get(self.name, ABSENT)

    def put(self, value: Any) -> None:
        """Let it hold something else."""
        if value is not ABSENT:
            getattr(self.module, self.kind)[self.name] = value
        else:
            getattr(self.module, self.kind).pop(self.name, None)

    def described(self, root: nn.Module) -> str:
        """For people, e.g. ``"parameter '0.weight'"``.

        Args:
            root: a module around this one.

        Returns:
            What it is, and its path from there.
        """
        kind = {"_parameters": "parameter", "_buffers": "buffer"}.get(self.kind, "attribute")
        path = next(path for path, module in root.named_modules() if module is self.module)
        return f"{kind} {f'{path}.{self.name}'.lstrip('.')!r}"


def shallow_copy(value: Any) -> Any:
    """Another container with the same contents.

    Args:
        value: anything.

    Returns:
        A copy of a list, dictionary, set or dataclass; anything else as it is.
    """
    return copy.copy(value) if _is_container(value) else value


def _is_container(value: Any) -> bool:
    if isinstance(value, (Tensor, int, nn.Module)):  # the most frequent
        return False
    return type(value) in _CONTAINERS or hasattr(type(value), "__dataclass_fields__")


def attributes(modules: Iterable[nn.Module]) -> dict[Slot, Any]:
    """What modules hold that is neither of torch's own nor a parameter, a buffer or a module.

    Args:
        modules: any modules.

    Returns:
        The value of each attribute.
    """
    return {
        Slot(module, "__dict__", name): value
        for module in modules
        for name, value in module.__dict__.items()
        if name not in NOT_FORWARDS
    }


def holders(modules: Iterable[nn.Module]) -> dict[Slot, Any]:
    """Attributes that can be changed without being assigned.

    Args:
        modules: any modules.

    Returns:
        The value of each that holds a tensor, or an object that is looked into.
    """
    return {
        Slot(module, "__dict__", name): value
        for module in modules
        for name, value in module.__dict__.items()
        if name not in NOT_FORWARDS and holds_what_changes(value)
    }
