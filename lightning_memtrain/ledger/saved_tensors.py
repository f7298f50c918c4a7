"""One pair of saved-tensor hooks for all ledgers.

Only the innermost pair of hooks is called, so ledgers that are nested share one pair, which tells each of
them. Hooks switch off autograd's check for in-place changes of saved tensors; this pair checks instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lightning_memtrain.ledger.storages import PLAIN_TENSORS

_SavedCallback = Callable[[torch.Tensor], None]


class _Saved(NamedTuple):
    tensor: torch.Tensor
    version: int


class SavedTensorWatch:
    """Calls back with every tensor that autograd saves for backward."""

    def __init__(self) -> None:
        self._callbacks: list[_SavedCallback] = []

    def add(self, callback: _SavedCallback) -> None:
        """Call ``callback`` with every saved tensor, until :meth:`remove`."""
        if not self._callbacks:
            torch._C._autograd._push_saved_tensors_default_hooks(self._pack, _unpack)
        self._callbacks.append(callback)

    def remove(self, callback: _SavedCallback) -> None:
        """Stop calling ``callback``."""
        self._callbacks.remove(callback)
        if not self._callbacks:
            torch._C._autograd._pop_saved_tensors_default_hooks()

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        for callback in tuple(self._callbacks):
            callback(tensor)
        return _Saved(tensor if tensor.is_leaf else _alias(tensor), tensor._version)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    # Keeping an operator's own output would tie its node to itself and keep both until a garbage collection;
    # an alias shares storage and version counter, and has no node. No mode need see how it is made.
    if type(tensor) not in PLAIN_TENSORS:
        return tensor.detach()
    with torch._C._DisableTorchDispatch():
        return tensor.detach()


def _unpack(saved: _Saved) -> torch.Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected "
            f"version {version} instead. Hint: enable anomaly detection to find the operation that failed to "
            "compute its gradient, with torch.autograd.set_detect_anomaly(True)."
        )
    return tensor


SAVED_TENSOR_WATCH = SavedTensorWatch()
