"""Sparse tensors in a step without data: their places are known, their values are not.

Torch's own tensors without data have no places when they are sparse, so a sparse gradient would hold nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import FakeTensor, disable_current_modes, storage_key

_aten = torch.ops.aten
_MAKE = _aten._sparse_coo_tensor_with_dims_and_tensors.default
_MASK = _aten.sparse_mask.default
_OF_BAGS = _aten._embedding_bag_backward.default
_IS_SPARSE = 9  # which of its arguments says so


class SparseGradients:
    """Lets sparse tensors be real ones, with the places that they have and zeros for their values.

    Args:
        note_unknown: told of each tensor whose values are no more than made up.
    """

    def __init__(self, note_unknown: Callable[[Tensor], None]) -> None:
        self._note_unknown = note_unknown
        self._made_up: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        # By storages of tensors without data, which live on beside the sparse tensors made of them.
        self._moved_to: dict[int, tuple[weakref.ref[torch.UntypedStorage], Tensor]] = {}

    def takes(self, func: Any, args: Any, tensors: list[Tensor]) -> bool:
        """Whether a call is one for :meth:`run`.

        Args:
            func: the operator.
            args: its arguments.
            tensors: those among them.

        Returns:
            Whether it makes such a tensor, or works on these alone.
        """
        if func is _MAKE:
            return isinstance(args[4], FakeTensor) and not isinstance(args[3], FakeTensor)
        if func is _OF_BAGS:
            return bool(args[_IS_SPARSE]) and not isinstance(args[1], FakeTensor)
        if not self._made_up:
            return False
        if func is _MASK:
            return self._is_made_up(args[1])
        return not any(isinstance(one, FakeTensor) for one in tensors) and any(map(self._is_made_up, tensors))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator.

        Args:
            func: one that :meth:`takes` said yes to.
            args: its arguments.
            kwargs: its arguments by name.

        Returns:
            What it returns.
        """
        if func is _MAKE:
            result = func(*args[:4], self._moved(args[4]), *args[5:], **kwargs)
        elif func is _OF_BAGS:
            result = func(*map(_zeros_for, args), **kwargs)
        elif func is _MASK:
            dense, mask = args
            values = torch.zeros(mask._values().shape, dtype=dense.dtype)
            places = mask._indices().clone()  # as torch's own does
            result = torch.sparse_coo_tensor(
                places, values, mask.shape, is_coalesced=mask.is_coalesced(), check_invariants=False
            )
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and func is not _aten._indices.default:
            self._follow(result)
        return result

    def _moved(self, values: Tensor) -> Tensor:
        """Zeros in the place of a tensor without data, whose bytes are from now on theirs.

        They last as long as it does, since whoever made the sparse tensor may hold the dense one longer.
        """
        storage = values.untyped_storage()
        key = storage_key(storage)
        with disable_current_modes():
            if key not in self._moved_to:
                zeros = torch.zeros(storage.nbytes() // values.dtype.itemsize, dtype=values.dtype)
                reference = weakref.ref(storage, lambda _: self._moved_to.pop(key, None))
                self._moved_to[key] = reference, zeros
            zeros = self._moved_to[key][1]
            made = zeros.as_strided(values.shape, values.stride(), values.storage_offset())
        storage.resize_(0)
        return made

    def _follow(self, result: Tensor) -> None:
        if result.layout is not torch.sparse_coo:
            self._note_unknown(result)
            return
        with disable_current_modes():
            values = result._values()
        self._note_unknown(values)
        storage = values.untyped_storage()
        key = storage_key(storage)
        self._made_up[key] = weakref.ref(storage, lambda _: self._made_up.pop(key, None))

    def _is_made_up(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.layout is not torch.sparse_coo:
            return False
        if isinstance(value, FakeTensor):
            return False
        with disable_current_modes():
            return storage_key(value._values().untyped_storage()) in self._made_up


def _zeros_for(value: Any) -> Any:
    """Zeros in the place of a tensor without data."""
    if not isinstance(value, FakeTensor):
        return value
    with disable_current_modes():
        return torch.zeros(value.shape, dtype=value.dtype)
