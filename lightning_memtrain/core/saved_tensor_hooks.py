"""Which hooks for saved tensors are in force, around whatever is running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_memtrain.compat.torch_private import top_saved_tensors_hooks

# Before torch 2.8 there is no such function.
_top_hooks: Callable[[bool], Any] = top_saved_tensors_hooks


def innermost_pack_hook() -> Any:
    """The hook that is called with what autograd saves next.

    Returns:
        The first of the two hooks that the innermost ``torch.autograd.graph.saved_tensors_hooks`` was given;
        ``None`` where none is in force, and before torch 2.8, which does not tell.

    Example:
        >>> import torch
        >>> pack = lambda tensor: tensor
        >>> with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        ...     hook = innermost_pack_hook()
        >>> hook in (pack, None), innermost_pack_hook() is None
        (True, True)
    """
    hooks = _top_hooks(True)
    return hooks[0] if hooks is not None else None
