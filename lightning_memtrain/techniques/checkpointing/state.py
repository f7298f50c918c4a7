"""What the modules of a call hold: parameters, buffers, modes, and attributes that forward assigns."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_memtrain.techniques.checkpointing.writes import copied, version_of

_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, Counter, deque)
_NOT_FORWARDS = frozenset({*nn.Module().__dict__, "forward", "_compiled_call_impl"})
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


class _Held:
    """What a slot held when a call began.

    Args:
        slot: the slot.
        value: what it held.
        is_restored: whether it is to hold the same when the call runs again.
    """

    __slots__ = ("before", "is_restored", "is_statistic", "slot", "value", "version")

    def __init__(self, slot: Slot, value: Any, is_restored: bool = True) -> None:
        self.slot = slot
        self.value = value
        self.is_restored = is_restored
        # Running statistics: the result in training does not depend on them, and they must not move again.
        self.is_statistic = False
        self.before: Tensor | None = None
        self.version = 0


class ModuleState:
    """What a module and those within it hold when a call begins, so that it can run again with the same.

    The tensors and flags that forward finds are noted, not copied; what it writes to in place was copied by
    :class:`KeptBefore`. Attributes that forward assigns, such as a counter, a hidden state or the state of a
    metric, are known once it has run, and from then on only these are noted.

    Args:
        modules: the module that is called, and those within it.
        assigned: the attributes that its first call assigned; ``None`` at the first call.
    """

    def __init__(self, modules: Sequence[nn.Module], assigned: Collection[Slot] | None) -> None:
        self._modules = modules
        self._held: list[_Held] = []
        sharded = _sharded_within(modules)
        for one in modules:
            if isinstance(one, torch.jit.ScriptModule):  # holds everything out of reach
                continue
            self._held.append(_Held(Slot(one, "__dict__", "training"), one.__dict__.get("training", ABSENT)))
            for name, buffer in one._buffers.items():
                self._held.append(_Held(Slot(one, "_buffers", name), buffer))
                self._held[-1].is_statistic = isinstance(one, _NormBase) and one.training
            for name, parameter in one._parameters.items():
                # Where it is sharded, hooks put it in and out.
                self._held.append(_Held(Slot(one, "_parameters", name), parameter, id(one) not in sharded))
        self._attributes = attributes(modules) if assigned is None else {}
        noted = dict.fromkeys(self._attributes if assigned is None else assigned)
        if modules[0]._forward_pre_hooks:  # they run before its forward, and assign attributes, too
            self._of_hooks = attributes(modules[:1])
            noted |= self._of_hooks
        else:
            self._of_hooks = {}
        self._held += [_Held(slot, shallow_copy(slot.value)) for slot in noted]

    @property
    def tensors(self) -> list[tuple[Slot, Tensor]]:
        """All tensors that the result may depend on."""
        return [
            (held.slot, held.value)
            for held in self._held
            if isinstance(held.value, Tensor) and not held.is_statistic
        ]

    @property
    def has_tensors_of_its_own(self) -> bool:
        """Whether there are tensors beside parameters and running statistics, which forward may write to."""
        return any(slot.kind != "_parameters" for slot, _ in self.tensors)

    @property
    def statistics(self) -> list[Tensor]:
        """Running statistics that the call moves."""
        return [held.value for held in self._held if held.is_statistic and held.value is not None]

    def call_ended(self, before: Mapping[Any, Tensor]) -> None:
        """Note what the call wrote to.

        Args:
            before: copies of what it wrote to, as it was before.
        """
        for held in self._held:
            if isinstance(held.value, Tensor):
                held.version = version_of(held.value)
                held.before = before.get(held.slot) if before else None

    def assigned(self, written: Collection[Any]) -> list[Slot]:
        """The attributes that the first call changed; of all attributes, only these are held from here.

        Args:
            written: keys of what it wrote to in place.

        Returns:
            Those that it assigned, and those that it wrote to.
        """
        contents = {held.slot: held.value for held in self._held if held.slot in self._attributes}
        now = attributes(self._modules)
        slots = {
            slot: None
            for slot in self._attributes | now
            if slot in written
            or _has_changed(self._attributes.get(slot, ABSENT), contents.get(slot), now.get(slot, ABSENT))
        }
        dropped = self._attributes.keys() - slots.keys() - self._of_hooks.keys()
        self._held = [held for held in self._held if held.slot not in dropped]
        self._held += [_Held(slot, ABSENT) for slot in slots if slot not in self._attributes]
        self._attributes = {}
        return [*slots]

    def changed_since(self) -> str | None:
        """The name of a tensor that was written to after the call, so that another run would see it."""
        for held in self._held:
            if (
                isinstance(held.value, Tensor)
                and version_of(held.value) != held.version
                and held.before is None
                and not held.is_statistic
            ):
                return held.slot.described(self._modules[0])
        return None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Everything as it was, to be written to and assigned; afterwards as it is now."""
        restored = [held for held in self._held if held.is_restored]
        now = [held.slot.value for held in restored]
        copies: dict[int, Tensor] = {}  # one for a tensor in several places
        try:
            for held in restored:
                if held.before is not None:
                    if id(held.before) not in copies:
                        copies[id(held.before)] = copied(held.before, held.value.requires_grad)
                    held.slot.put(copies[id(held.before)])
                elif held.is_statistic and held.value is not None:
                    held.slot.put(held.value.clone())
                else:
                    held.slot.put(shallow_copy(held.value))
            yield
        finally:
            for held, value in zip(restored, now, strict=True):
                held.slot.put(value)


def shallow_copy(value: Any) -> Any:
    """Another container with the same contents.

    Args:
        value: anything.

    Returns:
        A copy of a list, dictionary, set or dataclass; anything else as it is.
    """
    if isinstance(value, (Tensor, int, nn.Module)):  # the most frequent
        return value
    is_container = type(value) in _CONTAINERS or hasattr(type(value), "__dataclass_fields__")
    return copy.copy(value) if is_container else value


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
        if name not in _NOT_FORWARDS
    }


def _has_changed(before: Any, contents: Any, now: Any) -> bool:
    """Whether an attribute is another, or what it contains."""
    if before is not now:
        return True
    pairs = zip(_contents(contents), _contents(now), strict=False)
    return len(_contents(contents)) != len(_contents(now)) or any(one is not other for one, other in pairs)


def _contents(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if type(value) in _CONTAINERS:
        return list(value)
    return [*vars(value).values()] if shallow_copy(value) is not value and hasattr(value, "__dict__") else []


def _sharded_within(modules: Sequence[nn.Module]) -> set[int]:
    return {id(inner) for one in modules[1:] if unshards_itself(one) for inner in one.modules()}


def unshards_itself(module: nn.Module) -> bool:
    """Whether FSDP gives a module whole parameters while it runs, and only then.

    Args:
        module: any module.

    Returns:
        Whether it is one of FSDP, of either version.
    """
    return _is_of_fsdp(type(module))  # type: ignore[arg-type]


@cache
def _is_of_fsdp(kind: type[nn.Module]) -> bool:
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in kind.__mro__)
