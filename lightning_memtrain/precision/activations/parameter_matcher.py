"""Which saved tensors are parameters in another guise: these are never quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import storage_key, view_base
from lightning_memtrain.core.plain_tensors import is_plain

#: Nodes of autograd whose result is their argument, but for shape and dtype.
_SAME_NUMBERS = frozenset(
    {
        "Alias",
        "AsStrided",
        "Clone",
        "Diagonal",
        "Expand",
        "Permute",
        "ReshapeAlias",
        "Select",
        "Slice",
        "Split",
    }
    | {
        "Split",
        "SplitWithSizes",
        "Squeeze",
        "T",
        "ToCopy",
        "Transpose",
        "Unfold",
        "UnsafeView",
        "Unsqueeze",
        "View",
    }
)
_LONGEST_CHAIN = 16


class ParameterMatcher:
    """Recognises a model's parameters and buffers, their views, and the copies that autocast makes of them.

    Parameters that FSDP gathers are among them, and those of other models.

    Args:
        model: the module whose parameters are meant.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        # Should a parameter be replaced and an activation get its address, that is merely stored as it is.
        self._storages = {storage_key(t.untyped_storage()) for t in tensors if _has_storage(t)}
        # Autocast's copies of frozen parameters and of buffers have no history that leads back to them.
        self._frozen_shapes = {
            _unordered(t) for t in tensors if not t.requires_grad and t.is_floating_point() and t.dim() > 1
        }

    def __call__(self, tensor: Tensor) -> bool:
        """Whether a tensor holds a parameter's numbers."""
        if isinstance(tensor, nn.Parameter) or storage_key(tensor.untyped_storage()) in self._storages:
            return True
        # FSDP gathers weights into parameters of its own, which are made when they are first needed and are
        # gathered anew for backward: to pack them would cost memory.
        if isinstance(view_base(tensor), nn.Parameter):
            return True
        if not tensor.requires_grad:
            halved = tensor.dtype in (torch.bfloat16, torch.float16)
            return halved and bool(self._frozen_shapes) and _unordered(tensor) in self._frozen_shapes
        return self._descends_from_parameter(tensor.grad_fn)

    def _descends_from_parameter(self, node: Any) -> bool:
        for _ in range(_LONGEST_CHAIN):
            if node is None:
                return False
            variable = getattr(node, "variable", None)  # of a node that accumulates into `.grad`
            if variable is not None:
                gathered = isinstance(variable, nn.Parameter)
                return gathered or (
                    _has_storage(variable) and storage_key(variable.untyped_storage()) in self._storages
                )
            if node.name().rstrip("0123456789").removesuffix("Backward") not in _SAME_NUMBERS:
                return False
            node = node.next_functions[0][0] if node.next_functions else None
        return False


def _has_storage(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.layout is torch.strided


def _unordered(tensor: Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))
