"""Forms of operators' results, kept by the forms of their arguments: steps repeat themselves layer by layer.

Torch keeps them, too, but finds them by a long description of each argument, which takes many times as long
as what else happens around an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch

from lightning_memtrain.compat.torch_private import (
    DisableTorchDispatch,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    allows_data_pointer,
    dispatch_keys_of,
    make_subclass,
    refuse_data_pointer,
    storage_key,
    warn_of_data_pointer,
)
from lightning_memtrain.tracing.step.recorded_values import needs_data

#: Of tensors without data torch asks more often where they are than it computes with them.
DEVICE_OF = torch.ops.prim.device.default

_aten = torch.ops.aten
_META = torch.device("meta")
_SIMPLE = frozenset(
    (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
)
_SEVERAL = (list, tuple)
# They change their argument's own form, or return what they have been given out of sight of the dispatcher.
_NEVER = ("lift", "lift_fresh", "lift_fresh_copy", "resize", "resize_", "resize_as_", "set_")
_UNKNOWN = object()


class _Form(NamedTuple):
    """A tensor that a call makes.

    Args:
        place: of the argument whose memory it is in, among the tensors; ``None`` for memory of its own.
        shape: of the tensor.
        stride: of the tensor.
        offset: of its first entry in the memory.
        dtype: of the tensor.
        device: of the tensor.
    """

    place: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Forms(NamedTuple):
    """What a call returns.

    Args:
        results: of each result its form, the place of the argument that it is, or ``None``.
        container: the type that holds several; ``None`` for a single one.
    """

    results: tuple[_Form | int | None, ...]
    container: Callable[[Iterable[Any]], Any] | None


class ResultForms:
    """Runs operators on tensors without data; of calls like earlier ones only the results are made.

    A call is told by its operator, the forms of its tensors (shape, strides, offset, type, device, dispatch
    keys, whether they require gradients), and its other arguments. What these do not tell is run by torch
    each time: operators whose results depend on data, or that are not torch's own, or that change the form
    of an argument.

    Args:
        fake_mode: made the tensors.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._known: dict[tuple[Any, ...], _Forms | None] = {}
        self._guard_data = warn_of_data_pointer if allows_data_pointer(fake_mode) else refuse_data_pointer
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def run(self, func: Any, args: Any, kwargs: Any, call: Callable[[Any, Any, Any], Any]) -> Any:
        """What an operator returns.

        Args:
            func: the operator.
            args: its arguments.
            kwargs: its arguments by name.
            call: called with all three where the result is not known.

        Returns:
            What ``call`` returns, or tensors of the same forms.
        """
        if not _is_told_by_forms(func):
            return call(func, args, kwargs)
        tensors: list[Any] = []
        key = self._key(func, args, kwargs, tensors)
        if key is None:
            return call(func, args, kwargs)
        known: Any = self._known.get(key, _UNKNOWN)
        if known is _UNKNOWN:
            result = call(func, args, kwargs)
            again = self._key(func, args, kwargs, [])
            self._known[key] = self._forms(tensors, result) if again == key else None
            return result
        if known is None:
            return call(func, args, kwargs)
        results, container = known
        if container is None:
            return self._made(results[0], tensors)
        return container([self._made(form, tensors) for form in results])

    # ------------------------------------------------------------------ what a call is like

    def _key(self, func: Any, args: Any, kwargs: Any, tensors: list[Any]) -> tuple[Any, ...] | None:
        parts: list[Any] = [id(func), torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        any_number = _works_by_entry(func)
        if not self._describe(args, any_number, parts, tensors):
            return None
        if kwargs:
            parts += kwargs
            if not self._describe(kwargs.values(), any_number, parts, tensors):
                return None
        if not tensors:  # modes tell what becomes of it
            return None
        if func is _aten.index.Tensor and any(one.dtype in (torch.bool, torch.uint8) for one in tensors[1:]):
            return None  # its result has as many entries as there are true ones
        return tuple(parts)

    def _describe(
        self, values: Iterable[Any], any_number: bool, parts: list[Any], tensors: list[Any]
    ) -> bool:
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if value.constant is not None or value.fake_mode is not self._fake_mode:
                    return False
                tensors.append(value)
                parts += (
                    value.shape,
                    value.stride(),
                    value.storage_offset(),
                    value.dtype,
                    value.fake_device,
                    dispatch_keys_of(value).raw_repr(),
                    value.requires_grad,
                )
            elif value is None:
                parts.append(None)
            elif kind in _SIMPLE:
                # An equal number of another type may lead to another type of the result.
                parts += (kind,) if any_number and kind is float else (kind, value)
            elif kind in _SEVERAL:
                parts += (kind, len(value))
                if not self._describe(value, any_number, parts, tensors):
                    return False
            else:
                return False
        return True

    # ------------------------------------------------------------------ what a call returns

    def _forms(self, tensors: list[Any], result: Any) -> _Forms | None:
        """The forms of what a call has returned; ``None`` if they do not tell all of it."""
        several = type(result) in _SEVERAL
        results = [*result] if several else [result]
        forms = [self._form(one, tensors) for one in results]
        own = [
            storage_key(one.untyped_storage())
            for one, form in zip(results, forms, strict=True)
            if isinstance(form, _Form) and form.place is None
        ]
        if _UNKNOWN in forms or len({*own}) != len(own):  # some share the memory that they have made
            return None
        return _Forms(tuple(forms), type(result) if several else None)

    def _form(self, result: Any, tensors: list[Any]) -> Any:
        if result is None:
            return None
        if type(result) is not FakeTensor or result.layout is not torch.strided or result.requires_grad:
            return _UNKNOWN
        places = [place for place, one in enumerate(tensors) if one is result]
        storage = storage_key(result.untyped_storage())
        places = places or [i for i, one in enumerate(tensors) if _storage_key(one) == storage]
        if len(places) > 1:  # another call need not have one tensor in several places
            return _UNKNOWN
        if places and tensors[places[0]] is result:
            return places[0]
        place = places[0] if places else None
        offset = int(result.storage_offset())
        form = _Form(place, tuple(result.shape), result.stride(), offset, result.dtype, result.fake_device)
        return form if _are_alike(self._made(form, tensors), result) else _UNKNOWN

    def _made(self, form: Any, tensors: list[Any]) -> Any:
        """A result of a form."""
        if type(form) is int:
            return tensors[form]
        if form is None:
            return None
        place, shape, stride, offset, dtype, device = form
        with DisableTorchDispatch():
            bare = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
            if place is not None:
                bare.set_(tensors[place].untyped_storage(), offset, shape, stride)
            made = make_subclass(
                FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device
            )
        self._guard_data(made)
        attributes = self._attributes.get(device)
        if attributes is None:
            attributes = self._attributes[device] = vars(FakeTensor(self._fake_mode, bare, device))
        vars(made).update(attributes)
        return made


@cache
def _is_told_by_forms(func: Any) -> bool:
    """Whether an operator's results have forms that depend on those of its arguments alone."""
    if type(func) is not OpOverload or func.namespace not in ("aten", "prims"):
        return False
    name = func.overloadpacket.__name__
    is_view_in_place = torch.Tag.inplace_view in func.tags
    if name in _NEVER or is_view_in_place:
        return False
    return func is _aten.index.Tensor or not needs_data(func)


@cache
def _works_by_entry(func: Any) -> bool:
    """Whether a number among its arguments changes what an operator computes, not what that looks like."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket.__name__.startswith("_foreach_")


def _storage_key(tensor: Any) -> int | None:
    return storage_key(tensor.untyped_storage()) if tensor.layout is torch.strided else None


def _are_alike(made: Any, result: Any) -> bool:
    """Whether a tensor made of a form is like the one that torch has made."""
    ours, theirs = vars(made), vars(result)
    return (
        dispatch_keys_of(made).raw_repr() == dispatch_keys_of(result).raw_repr()
        and made.untyped_storage().nbytes() == result.untyped_storage().nbytes()
        and made.fake_device == result.fake_device
        and ours.keys() == theirs.keys()
        and all(one is theirs[name] for name, one in ours.items() if not isinstance(one, torch.device))
    )
