"""The dense weight of a sparse layer, for whoever asks the layer for it; it has no bytes until then."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import (
    DisableTorchFunctionSubclass,
    DispatchKey,
    disable_current_modes,
    disable_dynamo,
    is_backward_running,
    make_wrapper_subclass,
    schema_of,
    tree_leaves,
    tree_map_only,
    version_counter,
)
from lightning_memtrain.core import ArgumentError, OnDemandTensor
from lightning_memtrain.sparsity.storage.layers.autograd_functions import scatter_to_dense
from lightning_memtrain.sparsity.storage.patterns import Span, decode
from lightning_memtrain.sparsity.storage.shards import full_tensor

_NOT_IN_BACKWARD = -1
_aten = torch.ops.aten

# Asked for by code that goes past torch's operators to the bytes, which are made for it and kept.
_NEED_BYTES = frozenset(
    {
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.__format__,
        Tensor.__repr__,
        Tensor.data_ptr,
        Tensor.numpy,
        Tensor.storage,
        Tensor.tolist,
        Tensor.untyped_storage,
    }
)
# Of their first argument, these take shape, dtype and device.
_NEED_SHAPE_ONLY = frozenset(
    getattr(_aten, f"{what}_like").default for what in ("empty", "zeros", "ones", "full", "rand", "randn")
) | frozenset(getattr(_aten, f"new_{what}").default for what in ("empty", "zeros", "ones", "full"))


class StoredEntries(NamedTuple):
    """What a dense tensor is made from.

    Args:
        values: the stored entries of the weight.
        pattern: where they belong.
        numel: entries of the weight.
        span: the part of it that is meant.
        shape: of this part.
    """

    values: Tensor
    pattern: Tensor
    numel: int
    span: Span
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """Make the dense tensor, of the dtype of the values."""
        values = full_tensor(self.values.detach())[self.span.value_start : self.span.value_stop]
        positions = decode(self.pattern, self.numel, self.span)
        return scatter_to_dense(values, positions, math.prod(self.shape)).view(self.shape)

    def store(self, dense: Tensor) -> None:
        """Store the entries of a dense tensor of this shape that have a place here."""
        positions = decode(self.pattern, self.numel, self.span)
        values = self.values.detach()[self.span.value_start : self.span.value_stop]
        values.copy_(dense.reshape(-1).index_select(0, positions))
        if not self.values.is_inference():
            torch.autograd.graph.increment_version(self.values)


class _ViewStep(NamedTuple):
    """One operator that shows a part of a tensor, or all of it in another shape."""

    func: Callable[..., Any]
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    number: int | None

    def of(self, tensor: Any) -> Any:
        shown = self.func(tensor, *self.arguments, **self.options)
        return shown if self.number is None else shown[self.number]


class DenseWeight(OnDemandTensor):
    """The ``weight`` of a sparse layer, its views, and its gradient.

    It knows shape, dtype and device. Operators get a dense tensor that is made for them, in backward anew.
    ``torch.nn.init`` and other code write into a layer's weight in place: into a tensor that is made at each
    look this would be lost without a word, so whatever is written is read back into the stored values.

    Args:
        stored: what it is made from.
        views: how this one is seen.
        like: has the size and strides that it is seen with, if it is a view.
    """

    _stored: StoredEntries
    _views: tuple[_ViewStep, ...]
    _values_version: int | None
    _is_parameter: bool
    _make_part: Callable[[int], Tensor] | None
    _plain_copy: Tensor | None

    @staticmethod
    def __new__(
        cls: type[DenseWeight],
        stored: StoredEntries,
        views: tuple[_ViewStep, ...] = (),
        like: Tensor | None = None,
    ) -> DenseWeight:
        """Hold nothing but values and pattern."""
        values = stored.values
        size = stored.shape if like is None else tuple(like.shape)
        options: dict[str, Any] = {"dtype": values.dtype if like is None else like.dtype}
        if like is not None:
            options |= {"strides": like.stride(), "storage_offset": like.storage_offset()}
        made: DenseWeight = make_wrapper_subclass(cls, size, device=values.device, **options)
        made._stored, made._views, made._values_version = stored, views, _version(values)
        made._is_parameter, made._make_part, made._plain_copy = False, None, None
        return made

    @classmethod
    def of_parameter(cls, stored: StoredEntries) -> DenseWeight:
        """What stands in the place of a parameter.

        Args:
            stored: the whole of it.

        Returns:
            One that is copied, frozen and asked for its gradient as a parameter is.
        """
        made = cls(stored)
        made._is_parameter = True
        return made

    def split_into(self, part: Callable[[int], Tensor]) -> None:
        """Give whoever takes one matrix of three axes a tensor of its own, so that the others are not made.

        Args:
            part: makes it, ``shape[1:]``, by its number.
        """
        self._make_part = part

    def held(self) -> Sequence[Tensor]:
        """Values and pattern, which have the bytes of this tensor."""
        return self._stored.values, self._stored.pattern

    def is_weight_of(self, values: Tensor) -> bool:
        """Whether it is the whole dense weight of some values.

        Args:
            values: ``(nnz,)``, of a layer.

        Returns:
            ``False`` for views, which may be of another shape.
        """
        return self._stored.values is values and self._is_parameter

    # ------------------------------------------------------------------ what operators see

    @classmethod
    @disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, records_gradients = kwargs or {}, torch.is_grad_enabled()
        with DisableTorchFunctionSubclass(), torch.no_grad():
            if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
                return func.decompose(*args, **kwargs)  # in inference mode, nobody has done so before
            first = args[0] if args and isinstance(args[0], DenseWeight) else None
            if first is not None and func.is_view:
                return first._as_view(func, args[1:], kwargs)
            if first is not None and func in _NEED_SHAPE_ONLY and first.is_contiguous():
                return func(first._shape_only(), *args[1:], **kwargs)
            return _run_on_dense(func, args, kwargs, records_gradients)

    def _as_view(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        def part(like: Tensor, number: int | None) -> DenseWeight:
            made = DenseWeight(self._stored, (*self._views, _ViewStep(func, args, kwargs, number)), like)
            made._values_version = self._values_version
            return made

        with disable_current_modes():
            root = torch.empty(self._stored.shape, dtype=self._stored.values.dtype, device="meta")
            shown = func(self._apply_views(root), *args, **kwargs)
        if isinstance(shown, Tensor):
            return part(shown, None)
        return [part(one, number) for number, one in enumerate(shown)]

    def _apply_views(self, root: Tensor) -> Tensor:
        for view in self._views:
            root = view.of(root)
        return root

    def _shape_only(self) -> Tensor:
        return self._stored.values.detach().new_empty(1, dtype=self.dtype).expand(self.shape)

    def _refuse_stale(self) -> None:
        in_backward = is_backward_running()
        if in_backward and self._values_version != _version(self._stored.values):
            raise RuntimeError(
                "One of the variables needed for gradient computation, the weight of a sparse layer of shape "
                f"{self._stored.shape}, has been modified by an inplace operation since the forward. Change "
                "weights after the backward, or run the forward again."
            )

    # ------------------------------------------------------------------ what goes past operators

    @classmethod
    @disable_dynamo
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args and isinstance(args[0], DenseWeight) else None
        with DisableTorchFunctionSubclass():
            if weight is not None and func in _NEED_BYTES:
                weight._plain_copy = weight.clone()
                return func(weight._plain_copy, *args[1:], **kwargs)
            if weight is not None and func == Tensor.data.__set__:  # type: ignore[attr-defined]
                return _set_data(weight, *args[1:])
            if weight is not None and weight._is_parameter and func in _PARAMETER_ATTRIBUTES:
                return _PARAMETER_ATTRIBUTES[func](weight, *args[1:], **kwargs)
            if weight is not None and weight._make_part is not None and func in _INDEXING:
                return _index_parts(weight, weight._make_part, func, args[1:], kwargs)
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = copy.deepcopy(self._plain(), memo)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _plain(self) -> Tensor:
        """What it would be in a dense layer: a parameter, or a tensor with a history."""
        with DisableTorchFunctionSubclass():
            if self._is_parameter:
                return nn.Parameter(self.detach().clone(), self.requires_grad)
            return self.clone()


def _run_on_dense(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], records_gradients: bool) -> Any:
    """Run an operator on dense tensors, and store what it writes into them."""
    changed = [
        leaf
        for number, name in _written_arguments(func)
        for leaf in tree_leaves(args[number] if number < len(args) else kwargs.get(name))
        if isinstance(leaf, DenseWeight)
    ]
    if changed:
        _refuse_change(func, changed, records_gradients)
    roots: dict[tuple[int, Span], Tensor] = {}  # one for all views of the same entries
    seen: dict[int, Tensor] = {}

    def root_of(weight: DenseWeight) -> Tensor:
        key = id(weight._stored.values), weight._stored.span
        if key not in roots:
            roots[key] = weight._stored.dense()
        return roots[key]

    def dense(weight: DenseWeight) -> Tensor:
        weight._refuse_stale()
        return seen.setdefault(id(weight), weight._apply_views(root_of(weight)))

    def as_given(made: Any) -> Any:
        return next((weight for weight in changed if seen[id(weight)] is made), made)

    result = func(*tree_map_only(DenseWeight, dense, args), **tree_map_only(DenseWeight, dense, kwargs))
    for weight in changed:
        weight._stored.store(root_of(weight))
        weight._values_version = _version(weight._stored.values)
    return tree_map_only(Tensor, as_given, result) if changed else result


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Arguments that an operator writes into, by number and name."""
    return tuple(
        (number, argument.name)
        for number, argument in enumerate(schema_of(func).arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _refuse_change(func: Any, changed: Sequence[DenseWeight], records_gradients: bool) -> None:
    if records_gradients and any(weight.requires_grad for weight in changed):
        raise RuntimeError(
            "The weight of a sparse layer cannot be changed in place where gradients are recorded. "
            "Change it under `torch.no_grad()`."
        )
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(
            f"The weight of a sparse layer must keep its shape {changed[0]._stored.shape}, but got {func}. "
            "Make another layer instead."
        )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else version_counter(tensor)


# ---------------------------------------------------------------------- attributes of parameters


def _set_data(weight: DenseWeight, value: Tensor) -> None:
    """Write ``value`` instead of taking its memory, which nobody would look at again."""
    if value.shape != weight.shape:
        raise ArgumentError(
            f"The weight of a sparse layer must keep its shape {tuple(weight.shape)}, but got "
            f"{tuple(value.shape)}. Make another layer instead."
        )
    with torch.no_grad():
        weight.detach().copy_(value)


def _set_requires_grad(weight: DenseWeight, requires_grad: bool = True) -> DenseWeight:
    weight._stored.values.requires_grad_(requires_grad)
    return weight


def _gradient(weight: DenseWeight) -> DenseWeight | None:
    gradient: Tensor | None = weight._stored.values.grad
    return None if gradient is None else DenseWeight(weight._stored._replace(values=gradient))


def _set_gradient(weight: DenseWeight, gradient: Tensor | None) -> None:
    values = weight._stored.values
    if gradient is not None:
        with torch.no_grad():
            made = weight._stored._replace(values=torch.empty_like(values))
            DenseWeight(made).copy_(gradient)
        gradient = made.values
    values.grad = gradient


# What is asked of a parameter itself is asked of the values.
_PARAMETER_ATTRIBUTES: dict[Any, Callable[..., Any]] = {
    Tensor.requires_grad_: _set_requires_grad,
    Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    Tensor.grad.__get__: _gradient,  # type: ignore[union-attr]
    Tensor.grad.__set__: _set_gradient,  # type: ignore[union-attr]
}


# ---------------------------------------------------------------------- one matrix of three axes

_INDEXING = frozenset({Tensor.__getitem__, Tensor.__iter__, Tensor.select, Tensor.unbind})


def _index_parts(
    weight: DenseWeight,
    part: Callable[[int], Tensor],
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """The parts that are asked for, or what the function makes of the whole where they are no such parts."""
    if func is Tensor.__iter__:
        return iter([part(number) for number in range(len(weight))])
    if func is Tensor.unbind and not (args and args[0]) and not kwargs.get("dim"):
        return tuple(part(number) for number in range(len(weight)))
    number: Any = args[0] if func is Tensor.__getitem__ else None
    if func is Tensor.select and not kwargs and args[0] == 0:
        number = args[1]
    if isinstance(number, Tensor) and not number.dim() and not number.is_floating_point():
        number = number.item() if number.dtype != torch.bool else None
    if isinstance(number, int) and not isinstance(number, bool) and -len(weight) <= number < len(weight):
        return part(number % len(weight))
    return func(weight, *args, **kwargs)
