"""A limit on live bytes that is kept: a block is broken off before an operator goes beyond it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lightning_memtrain.compat.torch_private import FakeTensorMode, disable_current_modes, storage_key
from lightning_memtrain.core import OutOfReach, format_bytes
from lightning_memtrain.ledger.observers.dispatch_mode import traits_of
from lightning_memtrain.ledger.operators.workspace import OpCall, op_call
from lightning_memtrain.ledger.tensors.storages import PLAIN_TENSORS, storages_of, tensors_in


class LimitReached(OutOfReach, RuntimeError):
    """An operator would have made more bytes live than there may be.

    Args:
        needed_bytes: what would have been live at least.
        limit_bytes: what may be.
    """

    def __init__(self, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"at least {format_bytes(needed_bytes)} would be live, but {format_bytes(limit_bytes)} may be"
        )
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class ResultBytes:
    """Says how many bytes of new storages an operator makes before it runs, and learns where that is off.

    Operators are run on tensors without data, once for each form of arguments. What cannot be run so (results
    that depend on data, foreign operators), and what really makes more than its form says, is put at as many
    bytes per byte of arguments as were seen before; without any experience at one.

    Args:
        device: of the tensors that are counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[OpCall, int | None] = {}
        self._beyond: dict[Any, float] = {}
        self._last: tuple[Any, int, int] | None = None

    def before(self, func: Callable[..., Any], args: Any, kwargs: Any) -> int:
        """Bytes that a call is going to make.

        Args:
            func: the operator.
            args: its arguments.
            kwargs: its keyword arguments.

        Returns:
            The bytes; for most operators exactly these.
        """
        self._last = None
        if traits_of(func).returns_arguments:
            return 0
        tensors = tensors_in((args, kwargs))
        call = op_call(func, args, kwargs)
        if call not in self._known:
            plain = all(type(tensor) in PLAIN_TENSORS for tensor in tensors)
            self._known[call] = self._run_without_data(call) if plain else None
        num_bytes = self._known[call]
        argument_bytes = sum(tensor.nbytes for tensor in tensors)
        beyond = self._beyond.get(func, 0.0 if num_bytes is not None else 1.0)
        self._last = func, num_bytes or 0, argument_bytes
        return (num_bytes or 0) + int(beyond * argument_bytes)

    def after(self, num_bytes: int) -> None:
        """Learn from what the last call of :meth:`before` really made.

        Args:
            num_bytes: of its new storages.
        """
        if self._last is None:
            return
        func, expected_bytes, argument_bytes = self._last
        if num_bytes > expected_bytes or func in self._beyond:
            beyond = (num_bytes - expected_bytes) / max(argument_bytes, 1)
            self._beyond[func] = max(self._beyond.get(func, 0.0), beyond)

    def _run_without_data(self, call: OpCall) -> int | None:
        try:
            with disable_current_modes(), torch.no_grad(), FakeTensorMode():
                args, kwargs = call.make_arguments(self._device)
                before = _storage_bytes((args, kwargs))
                after = _storage_bytes((args, kwargs, call.func(*args, **kwargs)))
        except Exception:  # an operator may refuse tensors without data in any way it likes
            return None
        return sum(num_bytes - before.get(key, 0) for key, num_bytes in after.items())


class AllocationLimit:
    """What a :class:`~lightning_memtrain.MemoryLedger` asks before each operator.

    Args:
        limit_bytes: most bytes that may be live.
        results: says what operators make; one for several blocks learns from each for the next.
    """

    def __init__(self, limit_bytes: int, results: ResultBytes) -> None:
        self.limit_bytes = limit_bytes
        self.needed_bytes: int | None = None
        """What would have been live, if the block was broken off; who runs it may have caught the error."""
        self._results = results
        self._most_bytes = 0

    def before(
        self, func: Callable[..., Any], args: Any, kwargs: Any, live_bytes: int, late_bytes: int
    ) -> None:
        """Ask whether an operator may run.

        Args:
            func: the operator.
            args: its arguments.
            kwargs: its keyword arguments.
            live_bytes: what is live now.
            late_bytes: what was live from the beginning of the block, but was first seen in it.

        Raises:
            LimitReached: if it may not.
        """
        made_bytes = self._results.before(func, args, kwargs)
        self._most_bytes = max(self._most_bytes, live_bytes - late_bytes + made_bytes)
        if self._most_bytes + late_bytes > self.limit_bytes:
            self.needed_bytes = self._most_bytes + late_bytes
            raise LimitReached(self.needed_bytes, self.limit_bytes)

    def after(self, made_bytes: int) -> None:
        """Learn what the operator really made.

        Args:
            made_bytes: of its new storages.
        """
        self._results.after(made_bytes)


def _storage_bytes(tree: Any) -> dict[int, int]:
    storages: Iterable[torch.UntypedStorage] = (
        storage for tensor in tensors_in(tree) for storage in storages_of(tensor)
    )
    return {storage_key(storage): storage.nbytes() for storage in storages}
