"""What a tensor is besides its values, and its values where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import (
    is_traceable_wrapper_subclass,
    preserve_version_counter,
    storage_key,
)
from lightning_memtrain.core import is_out_of_memory
from lightning_memtrain.ledger.tensors.storages import storages_of

T = TypeVar("T")
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class TensorSnapshot:
    """A tensor as it was: its memory, its gradient and hooks, whether it wants a gradient.

    Args:
        target: the tensor, of any shape and dtype.
    """

    __slots__ = (
        *("_alias", "_bytes", "_grad", "_hooks", "_is_leaf", "_needs_grad", "_version", "copied"),
        "target",
    )

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.copied: Tensor | None = None
        self._version: preserve_version_counter | None = None
        self._bytes = 0
        self._is_leaf = target.is_leaf
        self._needs_grad = target.requires_grad
        self._grad = target.grad if self._is_leaf or target.retains_grad else None
        self._hooks = [getattr(target, name) for name in _HOOKS]
        # Holds the storage and the shape. One that is made of others holds these in attributes.
        self._alias = None if is_traceable_wrapper_subclass(target) else _or_none(target.detach)

    @property
    def held(self) -> list[Any]:
        """Its gradient and hooks."""
        return [self._grad, *self._hooks]

    def copy(self) -> None:
        """Keep the values, too.

        Raises:
            RuntimeError: if memory runs out.
        """
        target = self.target
        try:
            with _writing(target):
                self.copied = _written(target).clone()
        except Exception as error:  # a layout that cannot be copied
            if is_out_of_memory(error):
                raise
            return
        self._bytes = _or_none(lambda: target.untyped_storage().nbytes()) or 0
        # Notes the version now; to leave it is to go back to that. Inference tensors have none.
        self._version = _or_none(lambda: preserve_version_counter(target))

    @property
    def copied_bytes(self) -> int:
        """What the copy holds."""
        return 0 if self.copied is None else sum(storage.nbytes() for storage in storages_of(self.copied))

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        target = self.target
        if self._is_leaf and not target.is_leaf:
            with suppress(Exception):
                target.detach_()
        if self._alias is not None and not _is_same_memory(target, self._alias):
            with suppress(Exception):
                target.data = self._alias
        if self.copied is not None:
            self._restore_values(self.copied)
        if self._is_leaf and target.is_leaf:
            if target.requires_grad != self._needs_grad:
                with suppress(Exception):
                    target.requires_grad_(self._needs_grad)
            if target.grad is not self._grad:
                with suppress(Exception):
                    target.grad = self._grad
        for name, hooks in zip(_HOOKS, self._hooks, strict=True):
            now = getattr(target, name)
            if now is not hooks:
                with suppress(Exception):
                    # Once there are some, torch holds on to their dictionary.
                    now.clear() if hooks is None else setattr(target, name, hooks)

    def _restore_values(self, copied: Tensor) -> None:
        target = self.target
        try:
            with _writing(target):
                if self._bytes and target.untyped_storage().nbytes() < self._bytes:
                    target.untyped_storage().resize_(self._bytes)
                _written(target).copy_(copied)
        except Exception as error:
            if is_out_of_memory(error):
                raise
        if self._version is not None:
            with suppress(Exception):
                self._version.__exit__(None, None, None)


def _written(tensor: Tensor) -> Tensor:
    """Where the values of a tensor lie; an expanded one repeats them, and cannot be written to as a whole."""
    if tensor.layout is not torch.strided:
        return tensor  # another one would not share what it is made of
    tensor = tensor.detach()
    if tensor.numel() and not is_traceable_wrapper_subclass(tensor):
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _writing(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout is not torch.strided:
        return True
    return (
        one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and storage_key(one.untyped_storage()) == storage_key(other.untyped_storage())
    )


def _or_none(get: Callable[[], T]) -> T | None:
    try:
        return get()
    except Exception:
        return None
