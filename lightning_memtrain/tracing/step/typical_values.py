"""Answers that checks nearly always get, found along with the operators of a step without data.

Programs ask whether something went wrong: `if torch.isnan(x).any()`, `if not valid.all()`, `if x.sum() == 0`.
What is asked is known by the operators that lead to the question, so it can be told from any other one.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

# Elementwise: is anything there that should not be, or equal to something by chance?
_RARE = (_aten.isnan, _aten.isinf, _aten.isneginf, _aten.isposinf)
_COMPARISONS: dict[Any, Callable[[Any, Any], Any]] = {
    _aten.eq: operator.eq,
    _aten.ne: operator.ne,
    _aten.lt: operator.lt,
    _aten.le: operator.le,
    _aten.gt: operator.gt,
    _aten.ge: operator.ge,
}
_COMBINED: dict[Any, Callable[[Any, Any], Any]] = {
    _aten.logical_and: lambda one, other: one and other,
    _aten.bitwise_and: lambda one, other: one and other,
    _aten.mul: lambda one, other: one and other,  # `isfinite` multiplies what it asks for
    _aten.logical_or: lambda one, other: one or other,
    _aten.bitwise_or: lambda one, other: one or other,
}
_ORDERED = (_aten.lt, _aten.le, _aten.gt, _aten.ge)
_FAR = torch.finfo(torch.float16).max  # numbers lie within what their type can hold
_KEEP_VALUES = (
    _aten.alias,
    _aten.clone,
    _aten.detach,
    _aten.expand,
    _aten.permute,
    _aten.reshape,
    _aten.select,
    _aten.slice,
    _aten.squeeze,
    _aten.t,
    _aten.transpose,
    _aten.unsqueeze,
    _aten.view,
    _aten._to_copy,
    _aten.amax,
    _aten.amin,
    _aten.max,
    _aten.min,
)
_SOURCES = frozenset((*_RARE, *_COMPARISONS, _aten.all, _aten._is_all_true, _aten.any, _aten._is_any_true))


class TypicalValues:
    """What the entries of tensors without data usually are, where that is known: all of them the same."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def of(self, value: Any) -> Any:
        """The typical value of a tensor's entries.

        Args:
            value: a tensor, or a number, which is known.

        Returns:
            A number or a truth value; ``None`` if nothing is known.
        """
        if not isinstance(value, Tensor):
            return value if isinstance(value, (bool, int, float)) else None
        reference, known = self._known.get(id(value), (None, None))
        return known if reference is not None and reference() is value else None

    def follow(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Note what an operator's result usually is.

        Args:
            func: the operator.
            args: its arguments, as the program passed them.
            result: what it returned.
        """
        if not isinstance(result, Tensor) or not args:
            return
        packet = func.overloadpacket
        if packet in _SOURCES or (self._known and id(args[0]) in self._known):
            value = self._result(packet, args, result)
            if value is not None:
                key = id(result)
                self._known[key] = weakref.ref(result, lambda _: self._known.pop(key, None)), value

    def _result(self, packet: Any, args: tuple[Any, ...], result: Tensor) -> Any:
        first = self.of(args[0])
        if packet in (_aten.all, _aten._is_all_true):
            return True if first is None else bool(first)
        if packet in (_aten.any, _aten._is_any_true):
            return False if first is None else bool(first)
        if packet in _RARE:
            return False
        if packet in _COMPARISONS:
            return self._compared(packet, args, first)
        if first is None:
            return None
        if packet in (_aten.logical_not, _aten.bitwise_not):
            return not first
        if packet in (_aten.sum, _aten.count_nonzero):
            return int(first) * (args[0].numel() // max(result.numel(), 1))
        if packet in _COMBINED:
            second = self.of(args[1])
            return None if second is None else _COMBINED[packet](first, second)
        return first if packet in _KEEP_VALUES else None

    def _compared(self, packet: Any, args: tuple[Any, ...], first: Any) -> Any:
        second = self.of(args[1])
        if first is not None and second is not None:
            return _COMPARISONS[packet](first, second)
        if isinstance(second, (int, float)) and abs(second) >= _FAR and packet in _ORDERED:
            return _COMPARISONS[packet](0.0, second)
        if packet is _aten.eq:  # `x == x` asks for numbers that are none
            return args[0] is args[1]
        if packet is _aten.ne:
            return args[0] is not args[1]
        return None
