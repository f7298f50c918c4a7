"""From tensors to the storages that hold their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_memtrain.compat.torch_private import is_traceable_wrapper_subclass
from lightning_memtrain.core import OnDemandTensor

#: Types whose instances hold their bytes in one storage, unless their layout says otherwise.
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

_NO_TREES = (int, float, str, type(None))


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors in arguments or results of an operator, which are asked of every one.

    For what users make, such as batches, there is :func:`.objects.find_tensors`.

    Args:
        tree: lists, tuples, sets, mappings (and look-alikes) and dataclasses in any nesting; anything else
            that is no tensor is passed over.

    Returns:
        The tensors in the order in which they were found, with repetitions.
    """
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple, set, frozenset)):
        for item in tree:
            if isinstance(item, torch.Tensor):  # saves a call for most arguments of an operator
                found.append(item)
            elif not isinstance(item, _NO_TREES):
                _collect(item, found)
    elif isinstance(tree, _NO_TREES):
        return
    elif callable(getattr(tree, "values", None)):
        for item in tree.values():
            _collect(item, found)
    elif hasattr(tree, "__dataclass_fields__"):
        for name in tree.__dataclass_fields__:
            with suppress(Exception):  # a field may be unset, an argument only, or a property that raises
                _collect(getattr(tree, name), found)


def storages_of(tensor: torch.Tensor) -> Sequence[torch.UntypedStorage]:
    """The storages behind a tensor: one for a strided tensor, one per component for others.

    Wrapper subclasses (DTensor, quantised tensors) and sparse layouts hold their bytes in inner tensors.
    Uninitialised parameters and opaque layouts have no storage that could be counted.

    Args:
        tensor: any tensor, of any shape, dtype and layout.

    Returns:
        The storages, without repetition of inner tensors.
    """
    if type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided:  # nearly always, so this comes first
        return (tensor.untyped_storage(),)
    if is_lazy(tensor):
        return ()
    parts: Sequence[torch.Tensor]
    if isinstance(tensor, OnDemandTensor):
        parts = tensor.held()
    elif is_traceable_wrapper_subclass(tensor):
        inner_names, _ = tensor.__tensor_flatten__()
        # Distributed tensors name their device mesh among these, too.
        parts = [part for name in inner_names if isinstance(part := getattr(tensor, name), torch.Tensor)]
    elif tensor.layout is torch.strided:  # a subclass that holds its bytes itself, e.g. a fake tensor
        return (tensor.untyped_storage(),)
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        parts = []
    return [storage for part in parts for storage in storages_of(part)]
