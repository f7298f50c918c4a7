"""What operators hold while they run on this processor: measured, on a part where the whole is large."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from lightning_memtrain.core import MIB
from lightning_memtrain.ledger.operators.workspace import OpCall, OpWorkspace
from lightning_memtrain.planning.prediction.cpu.smaller_calls import sizes_of, smaller_sizes, with_size
from lightning_memtrain.planning.prediction.forked import Ask

#: Most bytes of arguments and results that an operator is measured with.
MOST_MEASURED_BYTES = 32 * MIB
# ... and where a part does not tell.
_MOST_BYTES = 512 * MIB

# Beside arguments and results, libraries keep copies of them in other orders and types, and sums by thread.
_MOST_COPIES = 2
_MOST_PER_THREAD_BYTES = 4 * MIB

# Operators that only make a tensor of a form, whatever its layout, or look at one.
_MAKERS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("clone", "empty_like", "ones_like", "zeros_like", "new_empty", "new_zeros", "zero_", "fill_"),
        "_unsafe_view",
    )
)

_known: dict[tuple[int, OpCall], tuple[int, str | None]] = {}


def measure_call(question: bytes) -> tuple[int, str | None]:
    """Measure a call of an operator, once in this process for a number of threads.

    An operator on more than 32 MiB is measured with three smaller sizes of one of its axes; if what it holds
    grows evenly, the whole follows. If it does not for any axis, it is run as it is, up to 512 MiB.

    Args:
        question: the call, and the bytes of its results, pickled.

    Returns:
        Most bytes that it holds beyond its arguments, results included, and why it is not known if it is not.
    """
    try:
        call, made_bytes = pickle.loads(question)
    except Exception as error:  # such as an operator that was made in the copy
        return 0, f"{type(error).__name__}: {error}"
    key = torch.get_num_threads(), call
    if key not in _known:
        _known[key] = _measure(call, made_bytes)
    return _known[key]


def _measure(call: OpCall, made_bytes: int) -> tuple[int, str | None]:
    workspace = OpWorkspace("cpu")
    num_bytes = _bytes_of(call) + made_bytes
    if num_bytes > MOST_MEASURED_BYTES:
        of_parts = _from_parts(call, made_bytes, workspace)
        if of_parts is not None:
            return of_parts, None
        if num_bytes > _MOST_BYTES:
            return 0, "it is too large to be run, and a part of it does not tell"
    peak_bytes = workspace.peak_bytes(call)
    return peak_bytes, workspace.unmeasured.get(call)


def _from_parts(call: OpCall, made_bytes: int, workspace: OpWorkspace) -> int | None:
    """What three parts of it lead to; ``None`` if they do not lie on a line, or none may be made."""
    for size in sizes_of(call):
        for part in smaller_sizes(size):
            calls = [with_size(call, size, num * part) for num in (1, 2, 3)]
            if not all(calls):
                break
            small = [one for one in calls if one is not None]
            if _bytes_of(small[-1]) + made_bytes * 3 * part // size > MOST_MEASURED_BYTES:
                continue
            first, second, third = (workspace.peak_bytes(one) for one in small)
            if any(one in workspace.unmeasured for one in small) or second - first != third - second:
                break
            whole_bytes = first + (second - first) * (size - part) // part
            if whole_bytes >= made_bytes:
                return whole_bytes
            break
    return None


def _bytes_of(call: OpCall) -> int:
    return sum(spec.num_bytes for spec in call.tensors)


class AskedWorkspace(OpWorkspace):
    """A table of workspaces in a copy of a process, measured by the original one, which has its threads.

    Args:
        ask: asks it :func:`measure_call`.
        num_threads: that the original one has.
    """

    def __init__(self, ask: Ask, num_threads: int) -> None:
        super().__init__("cpu")
        self._ask = ask
        self._num_threads = num_threads
        self._made_bytes: dict[OpCall, int] = {}

    def most_bytes(self, call: OpCall, made_bytes: int) -> float:
        """More than a call can hold; of an operator on every entry by itself, its results.

        Args:
            call: which.
            made_bytes: of its results.

        Returns:
            A bound.
        """
        self._made_bytes[call] = made_bytes
        if _works_by_entry(call):
            return made_bytes
        num_bytes = _bytes_of(call) + made_bytes
        of_threads = self._num_threads * min(num_bytes, _MOST_PER_THREAD_BYTES)
        return made_bytes + _MOST_COPIES * num_bytes + of_threads

    def _measure(self, call: OpCall) -> int:
        try:
            question = pickle.dumps((call, self._made_bytes.get(call, 0)))
        except Exception as error:  # an argument may be anything
            peak_bytes, unknown = 0, f"{type(error).__name__}: {error}"
        else:
            peak_bytes, unknown = self._ask(question)
        if unknown is not None:
            self.unmeasured[call] = unknown
        return int(peak_bytes)


def _works_by_entry(call: OpCall) -> bool:
    """Whether an operator needs nothing beside its results: those on single entries that convert no type."""
    if getattr(call.func, "overloadpacket", None) in _MAKERS or str(call.func).startswith("prim."):
        return True
    tags: Any = getattr(call.func, "tags", ())
    return torch.Tag.pointwise in tags and len({spec.dtype for spec in call.tensors}) == 1
