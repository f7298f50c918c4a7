"""What a tensor is besides its values, and its values where they are wanted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lightning_memtrain.core import is_out_of_memory


class TensorNote:
    """A tensor as it was: its memory, its gradient, whether it wants one.

    Args:
        target: the tensor.
    """

    __slots__ = (
        "_alias",
        "_bytes",
        "_grad",
        "_is_leaf",
        "_requires_grad",
        "_version",
        "copied",
        "target",
    )

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.copied: Tensor | None = None
        self._is_leaf = target.is_leaf
        self._needs_grad = target.requires_grad
        self._grad = target.grad if self._is_leaf or target.retains_grad else None
        self._alias = _or_none(target.detach)  # holds the storage and the shape
        self._bytes = _or_none(lambda: target.untyped_storage().nbytes())
        # Notes the version now; to leave it is to go back to that.
        self._version = _or_none(lambda: _unsafe_preserve_version_counter(target))

    @property
    def grad(self) -> Tensor | None:
        """The gradient that it had."""
        return self._grad

    def copy(self) -> None:
        """Copy the values, too."""
        try:
            with torch.inference_mode(self.target.is_inference()):
                self.copied = _without_repetition(self.target.detach()).clone()
        except Exception as error:
            if is_out_of_memory(error):
                raise

    def restore(self) -> None:
        """Put it back; may be called several times."""
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

    def _restore_values(self, copied: Tensor) -> None:
        target = self.target
        try:
            with torch.inference_mode(target.is_inference()):
                if self._bytes is not None and target.untyped_storage().nbytes() < self._bytes:
                    target.untyped_storage().resize_(self._bytes)
                _without_repetition(target.detach()).copy_(copied)
        except Exception as error:
            if is_out_of_memory(error):
                raise
        if self._version is not None:
            with suppress(Exception):
                self._version.__exit__(None, None, None)


def _without_repetition(tensor: Tensor) -> Tensor:
    """What an expanded tensor repeats, once: it cannot be written to as a whole."""
    if tensor.layout is torch.strided and 0 in tensor.stride() and tensor.numel():
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout is not torch.strided:
        return True
    return (
        one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage()._cdata == other.untyped_storage()._cdata
    )


def _or_none(get: Any) -> Any:
    try:
        return get()
    except Exception:
        return None
