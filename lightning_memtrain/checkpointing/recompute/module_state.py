"""What the modules of a call hold: parameters, buffers, modes, and attributes that forward assigns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing.recompute.module_attributes import (
    ABSENT,
    ModuleAttribute,
    attributes_of,
)
from lightning_memtrain.checkpointing.recompute.objects.object_copies import TensorCopies
from lightning_memtrain.checkpointing.recompute.parameter_data import ParameterData, sharded_within
from lightning_memtrain.checkpointing.recompute.unexpected_assignments import UnexpectedAssignments
from lightning_memtrain.compat.torch_private import DisableTorchDispatch, NormBase, forward_pre_hooks
from lightning_memtrain.tracing.inplace_writes import version_of


class _HeldAttribute:
    """What an attribute held when a call began.

    Args:
        attribute: the attribute.
        value: what it held.
        is_restored: whether it is to hold the same when the call runs again.
    """

    __slots__ = ("attribute", "before", "data", "identity", "is_restored", "is_statistic", "value", "version")

    def __init__(self, attribute: ModuleAttribute, value: Any, is_restored: bool = True) -> None:
        self.attribute = attribute
        self.value = value
        self.is_restored = is_restored
        # Running statistics: the result in training does not depend on them, and they must not move again.
        self.is_statistic = False
        self.before: Tensor | None = None
        self.version = 0
        # Of a parameter: which data it has, and the data itself if calls are known to give it others.
        self.identity: ParameterData | None = None
        self.data: Tensor | None = None


class ModuleState:
    """What a module and those within it hold when a call begins, so that it can run again with the same.

    The tensors and flags that forward finds are noted, not copied; what it writes to in place was copied by
    :class:`CopiesBeforeWrites`. Attributes that forward assigns, such as a counter, a hidden state or the
    state of a metric, are known once it has run, and from then on only these are noted, until a call assigns
    another. What changes within an attribute is found by :class:`ReachableObjects`.

    Args:
        modules: the module that is called, and those within it.
        assigned: what earlier calls assigned.
        given_other_data: the parameters that earlier calls gave other data.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        assigned: Collection[ModuleAttribute],
        given_other_data: Collection[ModuleAttribute],
    ) -> None:
        self._modules = modules
        self._held: list[_HeldAttribute] = []
        sharded = sharded_within(modules)
        for one in modules:
            if isinstance(one, torch.jit.ScriptModule):  # holds everything out of reach
                continue
            self._held.append(
                _HeldAttribute(
                    ModuleAttribute(one, "__dict__", "training"), one.__dict__.get("training", ABSENT)
                )
            )
            for name, buffer in one._buffers.items():
                self._held.append(_HeldAttribute(ModuleAttribute(one, "_buffers", name), buffer))
                self._held[-1].is_statistic = isinstance(one, NormBase) and one.training
            for name, parameter in one._parameters.items():
                # Where it is sharded, hooks put it in and out.
                held = _HeldAttribute(
                    ModuleAttribute(one, "_parameters", name), parameter, id(one) not in sharded
                )
                self._held.append(held)
                if held.is_restored:
                    held.identity = ParameterData.of(parameter)
                    if parameter is not None and held.attribute in given_other_data:
                        held.data = parameter.data
        noted = dict.fromkeys(assigned)
        if forward_pre_hooks(modules[0]):  # they run before its forward, and assign attributes, too
            noted |= attributes_of(modules[:1])
        self._held += [_HeldAttribute(attribute, attribute.value) for attribute in noted]
        self._noted = noted
        self._unexpected: UnexpectedAssignments | None = UnexpectedAssignments(modules)

    @property
    def tensors(self) -> list[tuple[ModuleAttribute, Tensor]]:
        """The parameters and buffers that the result may depend on."""
        return [
            (held.attribute, held.value)
            for held in self._held
            if held.attribute.kind != "__dict__" and isinstance(held.value, Tensor) and not held.is_statistic
        ]

    @property
    def has_own_tensors(self) -> bool:
        """Whether there are tensors beside parameters and running statistics, which forward may write to."""
        return any(
            held.attribute.kind != "_parameters" and isinstance(held.value, Tensor) and not held.is_statistic
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
            before: copies of what it wrote to, as it was before, in the same shapes and dtypes.
            tensors: what attributes and objects hold.
            changed: attributes within which it changed something.
        """
        more: dict[ModuleAttribute, Any] = {
            attribute: tensor for attribute, tensor in tensors if attribute in before
        }
        more |= dict.fromkeys(changed)  # a copy takes the place of each
        held_already = {held.attribute: held for held in self._held} if more else {}
        for attribute, value in more.items():
            if attribute in held_already:
                held_already[attribute].value = value
            elif isinstance(attribute, ModuleAttribute):
                self._held.append(_HeldAttribute(attribute, value))
        for held in self._held:
            if isinstance(held.value, Tensor):
                held.version = version_of(held.value)
                held.before = before.get(held.attribute) if before else None

    def assigned(self) -> list[ModuleAttribute]:
        """What the call is the first to assign; it is held from here."""
        assert self._unexpected is not None
        before = self._unexpected.assigned(self._noted)
        self._unexpected = None  # it keeps what it compares with
        self._held += [_HeldAttribute(attribute, value) for attribute, value in before.items()]
        return [*before]

    def given_other_data(self) -> list[ModuleAttribute]:
        """The parameters that have other data since, which is no change in place."""
        return [held.attribute for held in self._held if self._has_other_data(held)]

    @staticmethod
    def _has_other_data(held: _HeldAttribute) -> bool:
        # DeepSpeed gathers the data of each module when it runs.
        return (
            held.identity is not None
            and not held.identity.is_that_of(held.value)
            and not hasattr(held.value, "ds_id")
        )

    def changed_since(self) -> list[ModuleAttribute]:
        """Where the tensors are that were changed after the call, so that another run would see it."""
        return [
            held.attribute
            for held in self._held
            if isinstance(held.value, Tensor)
            and held.before is None
            and not held.is_statistic
            and (version_of(held.value) != held.version or (held.data is None and self._has_other_data(held)))
        ]

    @contextmanager
    def restored(self, copies: TensorCopies, object_copies: Mapping[Any, Any]) -> Iterator[None]:
        """Everything as it was, to be written to and assigned; afterwards as it is now.

        Args:
            copies: of tensors that are written to.
            object_copies: what to put in the place of attributes within which the call changed something.

        Yields:
            Nothing.
        """
        restored = [held for held in self._held if held.is_restored]
        now = [held.attribute.value for held in restored]
        # It may end in the middle of the forward, which would have set back what it changes for a while.
        unexpected = UnexpectedAssignments(self._modules)
        parameters = [held.value for held in restored if held.identity is not None]
        given_other_data = [held for held in restored if held.data is not None]
        gradients = [held.value.grad for held in given_other_data]
        there = [ParameterData.of(parameter) for parameter in parameters]
        with DisableTorchDispatch():  # it is no part of the program
            data = [parameter.data for parameter in parameters]
        try:
            for held in given_other_data:
                # What converts a parameter converts its gradient, too.
                held.value.data, held.value.grad = held.data, None
            for held in restored:
                if held.before is not None:
                    held.attribute.assign(copies.of(held.before, held.value.requires_grad))
                elif held.is_statistic and held.value is not None:
                    held.attribute.assign(held.value.clone())
                else:
                    held.attribute.assign(object_copies.get(held.attribute, held.value))
            yield
        finally:
            for held, value in zip(restored, now, strict=True):
                held.attribute.assign(value)
            for attribute, value in unexpected.assigned().items():
                attribute.assign(value)
            for parameter, identity, value in zip(parameters, there, data, strict=True):
                if identity is not None and not identity.is_that_of(parameter):
                    parameter.data = value
            for held, gradient in zip(given_other_data, gradients, strict=True):
                held.value.grad = gradient
