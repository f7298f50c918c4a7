"""One pair of saved-tensor hooks for all ledgers of a thread.

Only the innermost pair of hooks is called, so ledgers that are nested share one pair, which tells each of
them, and which hands on to the pair around it. Hooks switch off autograd's check for in-place changes of
saved tensors; :class:`VersionCheckedTensor` checks instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lightning_memtrain.compat.torch_private import (
    make_subclass,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    skip_in_dynamo,
    top_saved_tensors_hooks,
    version_counter,
)
from lightning_memtrain.ledger.tensors.storages import PLAIN_TENSORS, tensors_in

_SavedCallback = Callable[[torch.Tensor], None]
HookPair = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def hooks_in_force() -> HookPair | None:
    """The innermost pair of saved-tensor hooks; ``None`` also before torch 2.8, which does not tell."""
    ask = top_saved_tensors_hooks
    pair: HookPair | None = None if ask is None else ask(True)
    return pair


class VersionCheckedTensor(NamedTuple):
    """A tensor that hooks keep as it is, with autograd's check for in-place changes.

    Args:
        tensor: shares its storage with the saved tensor.
        version: of the saved tensor when it was saved.
    """

    tensor: torch.Tensor
    version: int

    @classmethod
    def pack(cls, tensor: torch.Tensor) -> VersionCheckedTensor:
        """What a pack hook should return that keeps ``tensor``, of any shape and dtype, as it is."""
        return cls(tensor if tensor.is_leaf else _alias(tensor), version_counter(tensor))

    def unpack(self) -> torch.Tensor:
        """The tensor, if it is still what it was.

        Returns:
            The tensor.

        Raises:
            RuntimeError: if it was changed in place since it was saved.
        """
        tensor, version = self
        if version_counter(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {version_counter(tensor)}; "
                f"expected version {version} instead. Hint: enable anomaly detection to find the operation "
                "that failed to compute its gradient, with torch.autograd.set_detect_anomaly(True)."
            )
        return tensor


class SavedTensorHooks:
    """Calls back with every tensor that autograd saves for backward in a thread.

    Inside of other hooks, such as those that compress what is saved, it calls back with what these keep.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._pairs: list[_WatchingPair] = []

    def add(self, callback: _SavedCallback) -> None:
        """Call ``callback`` with every tensor that this thread saves, until :meth:`remove` in this thread."""
        pair: _WatchingPair | None = getattr(self._here, "pair", None)
        if pair is None:
            pair = self._here.pair = _WatchingPair(hooks_in_force())
            self._pairs.append(pair)
            push_saved_tensors_hooks(pair.pack, pair.unpack)
        pair.callbacks = (*pair.callbacks, callback)

    def remove(self, callback: _SavedCallback) -> None:
        """Stop calling ``callback`` with saved tensors."""
        pair: _WatchingPair = self._here.pair
        callbacks = [*pair.callbacks]
        callbacks.remove(callback)
        pair.callbacks = tuple(callbacks)
        if not pair.callbacks:
            pop_saved_tensors_hooks()
            self._pairs.remove(pair)
            del self._here.pair

    def tell(self, tensor: torch.Tensor) -> None:
        """Say that ``tensor``, of any shape and dtype, is kept for backward; for hooks inside of these."""
        pair: _WatchingPair | None = getattr(self._here, "pair", None)
        # Autograd may work for a thread in one of its own. Who is told there asks whether it is concerned.
        for one in (pair,) if pair is not None else tuple(self._pairs):
            one.tell(tensor)


class _WatchingPair:
    """The pair of hooks of one thread.

    Args:
        around: the hooks that were in force, which still decide on what is kept.
    """

    def __init__(self, around: HookPair | None) -> None:
        self.callbacks: tuple[_SavedCallback, ...] = ()
        self._around = around
        # What was packed by hooks that are gone by then has to be unpacked by them all the same.
        self.unpack = VersionCheckedTensor.unpack if around is None else around[1]

    def tell(self, tensor: torch.Tensor) -> None:
        for callback in self.callbacks:
            callback(tensor)

    def pack(self, tensor: torch.Tensor) -> Any:
        if self._around is None:
            for callback in self.callbacks:
                callback(tensor)
            return VersionCheckedTensor(tensor if tensor.is_leaf else _alias(tensor), version_counter(tensor))
        packed = self._around[0](tensor)
        for kept in tensors_in(packed):
            self.tell(kept)
        return packed


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    # Keeping an operator's own output would tie its node to itself and keep both until a garbage collection;
    # an alias shares storage and version counter, and has no node. No mode need see how it is made.
    if type(tensor) not in PLAIN_TENSORS:
        return tensor.detach()
    # This detaches out of sight of every mode, faster than `detach` with the modes disabled.
    alias: torch.Tensor = make_subclass(torch.Tensor, tensor)
    return alias


skip_in_dynamo(_WatchingPair.pack, VersionCheckedTensor.unpack)
SAVED_TENSOR_HOOKS = SavedTensorHooks()
