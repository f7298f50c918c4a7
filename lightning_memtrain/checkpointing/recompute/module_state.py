"""What the modules of a call hold: parameters, buffers, modes, and attributes that forward assigns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_memtrain.checkpointing.recompute.copies_before_writes import version_of
from lightning_memtrain.checkpointing.recompute.module_attributes import ABSENT, Slot, attributes
from lightning_memtrain.checkpointing.recompute.objects.object_copies import Copies
from lightning_memtrain.checkpointing.recompute.unexpected_assignments import Bystanders


class _Held:
    """What a slot held when a call began.

    Args:
        slot: the slot.
        value: what it held.
        is_restored: whether it is to hold the same when the call runs again.
    """

    __slots__ = ("before", "data", "identity", "is_restored", "is_statistic", "slot", "value", "version")

    def __init__(self, slot: Slot, value: Any, is_restored: bool = True) -> None:
        self.slot = slot
        self.value = value
        self.is_restored = is_restored
        # Running statistics: the result in training does not depend on them, and they must not move again.
        self.is_statistic = False
        self.before: Tensor | None = None
        self.version = 0
        # Of a parameter: which data it has, and the data itself if calls are known to give it others.
        self.identity: _Data | None = None
        self.data: Tensor | None = None


class ModuleState:
    """What a module and those within it hold when a call begins, so that it can run again with the same.

    The tensors and flags that forward finds are noted, not copied; what it writes to in place was copied by
    :class:`KeptBefore`. Attributes that forward assigns, such as a counter, a hidden state or the state of a
    metric, are known once it has run, and from then on only these are noted, until a call assigns another.
    What changes within an attribute is found by :class:`Objects`.

    Args:
        modules: the module that is called, and those within it.
        assigned: what earlier calls assigned.
        swapped: the parameters that earlier calls gave other data.
    """

    def __init__(
        self, modules: Sequence[nn.Module], assigned: Collection[Slot], swapped: Collection[Slot]
    ) -> None:
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
                held = _Held(Slot(one, "_parameters", name), parameter, id(one) not in sharded)
                self._held.append(held)
                if held.is_restored:
                    held.identity = _Data.of(parameter)
                    if parameter is not None and held.slot in swapped:
                        held.data = parameter.data
        noted = dict.fromkeys(assigned)
        if modules[0]._forward_pre_hooks:  # they run before its forward, and assign attributes, too
            noted |= attributes(modules[:1])
        self._held += [_Held(slot, slot.value) for slot in noted]
        self._noted = noted
        self._bystanders: Bystanders | None = Bystanders(modules)

    @property
    def tensors(self) -> list[tuple[Slot, Tensor]]:
        """The parameters and buffers that the result may depend on."""
        return [
            (held.slot, held.value)
            for held in self._held
            if held.slot.kind != "__dict__" and isinstance(held.value, Tensor) and not held.is_statistic
        ]

    @property
    def has_tensors_of_its_own(self) -> bool:
        """Whether there are tensors beside parameters and running statistics, which forward may write to."""
        return any(
            held.slot.kind != "_parameters" and isinstance(held.value, Tensor) and not held.is_statistic
            for held in self._held
        )

    @property
    def statistics(self) -> list[Tensor]:
        """Running statistics that the call moves."""
        return [held.value for held in self._held if held.is_statistic and held.value is not None]

    def call_ended(
        self, before: Mapping[Any, Tensor], tensors: Sequence[tuple[Any, Tensor]], changed: Collection[Any]
    ) -> None:
        """Note what the call wrote to.

        Args:
            before: copies of what it wrote to, as it was before.
            tensors: what attributes and objects hold.
            changed: attributes within which it changed something.
        """
        more: dict[Slot, Any] = {slot: tensor for slot, tensor in tensors if slot in before}
        more |= dict.fromkeys(changed)  # a twin takes the place of each
        held_already = {held.slot: held for held in self._held} if more else {}
        for slot, value in more.items():
            if slot in held_already:
                held_already[slot].value = value
            elif isinstance(slot, Slot):
                self._held.append(_Held(slot, value))
        for held in self._held:
            if isinstance(held.value, Tensor):
                held.version = version_of(held.value)
                held.before = before.get(held.slot) if before else None

    def assigned(self) -> list[Slot]:
        """What the call is the first to assign; it is held from here."""
        assert self._bystanders is not None
        before = self._bystanders.assigned(self._noted)
        self._bystanders = None  # it keeps what it compares with
        self._held += [_Held(slot, value) for slot, value in before.items()]
        return [*before]

    def swapped(self) -> list[Slot]:
        """The parameters that have other data since, which is no change in place."""
        return [held.slot for held in self._held if self._has_other_data(held)]

    @staticmethod
    def _has_other_data(held: _Held) -> bool:
        # DeepSpeed gathers the data of each module when it runs.
        return (
            held.identity is not None
            and not held.identity.is_that_of(held.value)
            and not hasattr(held.value, "ds_id")
        )

    def changed_since(self) -> list[Slot]:
        """Where the tensors are that were changed after the call, so that another run would see it."""
        return [
            held.slot
            for held in self._held
            if isinstance(held.value, Tensor)
            and held.before is None
            and not held.is_statistic
            and (version_of(held.value) != held.version or (held.data is None and self._has_other_data(held)))
        ]

    @contextmanager
    def restored(self, copies: Copies, twins: Mapping[Any, Any]) -> Iterator[None]:
        """Everything as it was, to be written to and assigned; afterwards as it is now.

        Args:
            copies: of tensors that are written to.
            twins: what to put in the place of attributes within which the call changed something.

        Yields:
            Nothing.
        """
        restored = [held for held in self._held if held.is_restored]
        now = [held.slot.value for held in restored]
        # It may end in the middle of the forward, which would have set back what it changes for a while.
        bystanders = Bystanders(self._modules)
        parameters = [held.value for held in restored if held.identity is not None]
        swapped = [held for held in restored if held.data is not None]
        gradients = [held.value.grad for held in swapped]
        there = [_Data.of(parameter) for parameter in parameters]
        with torch._C._DisableTorchDispatch():  # it is no part of the program
            data = [parameter.data for parameter in parameters]
        try:
            for held in swapped:
                # What converts a parameter converts its gradient, too.
                held.value.data, held.value.grad = held.data, None
            for held in restored:
                if held.before is not None:
                    held.slot.put(copies.of(held.before, held.value.requires_grad))
                elif held.is_statistic and held.value is not None:
                    held.slot.put(held.value.clone())
                else:
                    held.slot.put(twins.get(held.slot, held.value))
            yield
        finally:
            for held, value in zip(restored, now, strict=True):
                held.slot.put(value)
            for slot, value in bystanders.assigned().items():
                slot.put(value)
            for parameter, identity, value in zip(parameters, there, data, strict=True):
                if identity is not None and not identity.is_that_of(parameter):
                    parameter.data = value
            for held, gradient in zip(swapped, gradients, strict=True):
                held.value.grad = gradient


class _Data(NamedTuple):
    """Which data a parameter has: where in which storage, which may be empty for a while, as under FSDP."""

    storage: torch.UntypedStorage
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, parameter: Any) -> _Data | None:
        """That of a parameter; ``None`` for other classes, such as tensors without data."""
        if type(parameter) is not nn.Parameter:
            return None
        return cls(parameter.untyped_storage(), int(parameter.storage_offset()), parameter.dtype)

    def is_that_of(self, parameter: Any) -> bool:
        """Whether a parameter has this data."""
        return bool(
            # As long as it is held, no other one has its number.
            self.storage._cdata == parameter.untyped_storage()._cdata
            and self.offset == parameter.storage_offset()
            and self.dtype is parameter.dtype
        )


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
