"""A model made without the memory of its weights: what is large on the CPU has no data there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_memtrain.compat.torch_private import (
    FakeTensor,
    TorchDispatchMode,
    schema_of,
    skip_in_dynamo,
    tree_leaves,
)
from lightning_memtrain.tracing.cuda_twin.device_mode import TwinDeviceMode

# Programs ask for values of small ones: rates of dropout by depth, numbers of heads, tables of positions.
_SMALL_BYTES = 2**16
_ALL_SMALL_BYTES = 2**28


class LargeWithoutData(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets operators that would make large tensors on the CPU make ones without data.

    Enter it within the mode that follows tensors without data.

    Args:
        mode: makes them, and answers what is asked of them.
    """

    def __init__(self, mode: TwinDeviceMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._left_bytes = _ALL_SMALL_BYTES

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would wrap every operator in more calls otherwise.
        return not skip_in_dynamo(cls.__dict__["__torch_dispatch__"])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if not _makes_tensors(func) or any(isinstance(one, FakeTensor) for one in tensors):
            return func(*args, **kwargs)
        try:
            made = self._mode.without_data(func, args, kwargs)
        except Exception:  # its own error, if it has one, comes from the operator itself
            return func(*args, **kwargs)
        num_bytes = sum(one.nbytes for one in tree_leaves(made) if isinstance(one, Tensor))
        if num_bytes > min(_SMALL_BYTES, self._left_bytes):
            return made
        self._left_bytes -= num_bytes
        return func(*args, **kwargs)


def _makes_tensors(func: Any) -> bool:
    """Whether an operator's results are tensors of its own, not its arguments or views of them."""
    returns: Any = getattr(schema_of(func), "returns", ())
    return (
        bool(returns) and all(one.alias_info is None for one in returns) and "Tensor" in str(returns[0].type)
    )
