"""Plain values that stand for policies, in Python and in YAML alike: short names, sizes, lists of modules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from lightning_memtrain.checkpointing.memory_budget import DEVICE, MemoryBudget
from lightning_memtrain.checkpointing.policies import (
    Full,
    Modules,
    Nested,
    RecomputationPolicy,
    SelectiveOps,
    Sqrt,
)
from lightning_memtrain.core import ArgumentError, ByteLimit, parse_bytes
from lightning_memtrain.core.arguments.module_selectors import as_selectors

_ARGUMENT = "ActivationCheckpointing(policy)"

SHORT_NAMES: dict[str, Callable[[], RecomputationPolicy]] = {
    "auto": MemoryBudget,
    "full": Full,
    "nested": Nested,
    "selective": SelectiveOps,
    "sqrt": Sqrt,
}


def as_policy(value: Any) -> RecomputationPolicy:
    """The policy that a plain value stands for.

    Args:
        value: a policy; its short name; a size (``"4GiB"`` or a number of bytes), a share of the device's
            memory (0.9) or ``"device"``, for :class:`MemoryBudget`; or a list, for :class:`Modules`.

    Returns:
        The policy.

    Raises:
        ArgumentError: if it is none of these.

    Example:
        >>> as_policy("4GiB"), as_policy("sqrt"), as_policy(["encoder"])
        (MemoryBudget(limit='4GiB'), Sqrt(), Modules(names_or_types=('encoder',)))
    """
    if isinstance(value, RecomputationPolicy):
        return value
    if isinstance(value, str):
        return _named(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, Integral) else float(value)
        _ = ByteLimit(number, _ARGUMENT)  # so that an error names what the user has called
        return MemoryBudget(number)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return Modules(
            as_selectors("ActivationCheckpointing", "Write e.g. ['encoder.layer.0'].", policy=value)
        )
    raise ArgumentError(
        "`ActivationCheckpointing(policy)` must be a policy, its short name, a size, a share of the "
        f"device's memory such as 0.9, or a list of modules, but got policy={value!r}. Use e.g. "
        "policy='auto' or policy='4GiB'."
    )


def _named(value: str) -> RecomputationPolicy:
    if value in SHORT_NAMES:
        return SHORT_NAMES[value]()
    if value == DEVICE or _is_size(value):
        return MemoryBudget(value)
    near = difflib.get_close_matches(value, SHORT_NAMES, n=1)
    cure = f"Did you mean {near[0]!r}?" if near else f"For a module write policy=[{value!r}]."
    expected = ", ".join(repr(name) for name in SHORT_NAMES)
    raise ArgumentError(
        f"`ActivationCheckpointing(policy)` must be {expected}, a size such as '4GiB', a policy, or a list "
        f"of modules, but got policy={value!r}. {cure}"
    )


def _is_size(value: str) -> bool:
    try:
        parse_bytes(value)
    except ValueError:
        return False
    return True
