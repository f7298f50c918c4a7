"""What autograd writes in place on a device, but not while a mode watches it."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import (
    get_current_dispatch_mode_stack,
    is_backward_running,
    storage_key,
    storage_use_count,
    use_count_of,
)
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE

_aten = torch.ops.aten
_NOT_IN_BACKWARD = -1
_SCATTERS = frozenset(
    (_aten.scatter, _aten.scatter_add, _aten.index_add, _aten.index_put, _aten.masked_scatter)
)


class InPlaceGradients:
    """Tells the operators whose result autograd would write into their first argument, if no mode were on.

    It adds gradients up in place if nobody else holds the first one (``input_buffer.cpp``), and scatters into
    zeros that it has just made (``FunctionsManual.cpp``). Either makes a tensor of its own where operators go
    through a mode, so that the step would seem to need more than it does.
    """

    def __init__(self) -> None:
        self._alone: tuple[int, int] | None = None
        self._alone_under: dict[tuple[type, ...], tuple[int, int]] = {}
        self._seen: list[tuple[int, int]] | None = None
        self._zeros: weakref.ref[Tensor] | None = None

    def calibrate_before_backward(self) -> None:
        """Calibrate whenever a backward begins, for the rest of this process."""
        engine: Any = torch.autograd
        run = engine._engine_run_backward

        @functools.wraps(run)
        def calibrated(*args: Any, **kwargs: Any) -> Any:
            self.calibrate()
            return run(*args, **kwargs)

        engine._engine_run_backward = calibrated

    def calibrate(self) -> None:
        """See what a gradient that autograd alone holds looks like.

        The modes that are on, such as a ledger's, hold it, too, so it depends on them.
        """
        modes = tuple(map(type, get_current_dispatch_mode_stack()))
        if self._seen is not None or not modes:
            return
        if modes not in self._alone_under:
            self._seen = []
            with torch.enable_grad():
                weight = torch.ones(2, device=DEVICE_TYPE, requires_grad=True)
                middle = weight * 2
                loss: Any = (middle.tanh() * middle.exp()).sum()
                loss.backward()
            self._alone_under[modes], self._seen = self._seen[0], None
        self._alone = self._alone_under[modes]

    def takes_place(self, func: Any, args: Any) -> bool:
        """Whether an operator is to write into its first argument.

        Args:
            func: the operator.
            args: its arguments.

        Returns:
            Whether autograd would let it.
        """
        if not is_backward_running():
            return False
        if func is _aten.add.Tensor:
            if self._seen is not None:
                self._seen.append(_holders(args[0]))
                return False
            first, other = args[:2]
            return (
                isinstance(other, Tensor)
                and first.shape == other.shape
                and first.dtype is other.dtype
                and _holders(first) == self._alone
            )
        return func.overloadpacket in _SCATTERS and self._zeros is not None and self._zeros() is args[0]

    def follow(self, func: Any, result: Any) -> None:
        """Note zeros that were just made.

        Args:
            func: the operator.
            result: what it returned.
        """
        if func is _aten.new_zeros.default:
            self._zeros = weakref.ref(result)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many hold a tensor, and its storage."""
    return use_count_of(tensor), storage_use_count(storage_key(tensor.untyped_storage()))
