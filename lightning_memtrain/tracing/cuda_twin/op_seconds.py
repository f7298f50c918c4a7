"""How long an operator may take on a GPU: an estimate, for choices that weigh time against memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_memtrain.compat.torch_private import disable_current_modes, tree_leaves

# Of an A100's data sheet: memory, and matrix products in TF32. Only their ratio decides on a choice.
_BYTES_PER_SECOND = 1.555e12
_OPERATIONS_PER_SECOND = 156e12
_LAUNCH_SECONDS = 5e-6


def seconds_of(
    make_arguments: Callable[[torch.device], tuple[list[Any], dict[str, Any]]], function: Callable[..., Any]
) -> float:
    """Estimate the time of an operator by the bytes that it moves and the operations that it does.

    Args:
        make_arguments: makes arguments of it on a device.
        function: the operator.

    Returns:
        Seconds; 0 if it cannot be told what it does.
    """
    try:
        with disable_current_modes(), torch.no_grad():
            args, kwargs = make_arguments(torch.device("meta"))
            with FlopCounterMode(display=False) as counter:
                result = function(*args, **kwargs)
    except Exception:  # an operator may have no rule for tensors without data
        return 0.0
    tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
    moving = sum(one.nbytes for one in tensors) / _BYTES_PER_SECOND
    computing = counter.get_total_flops() / _OPERATIONS_PER_SECOND
    return float(max(moving, computing) + _LAUNCH_SECONDS)
