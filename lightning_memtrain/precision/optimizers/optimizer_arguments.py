"""Checks of what optimizers take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_memtrain.core.arguments.value_checks import check_numbers, wrong


def check_parameters(owner: str, params: Any) -> None:
    """Refuse what is neither parameters nor groups of them.

    Args:
        owner: what the user has called.
        params: the argument. A generator is left alone: it can be read once only.

    Raises:
        ArgumentError: naming the argument.
    """
    is_list = isinstance(params, Sequence) and not isinstance(params, (str, bytes))
    fits = all(isinstance(one, (Tensor, dict, tuple)) for one in params) and params if is_list else True
    if isinstance(params, (str, bytes, Tensor)) or not isinstance(params, Iterable) or not fits:
        cure = "Pass `model.parameters()`."
        raise wrong(owner, "params", "parameters, at least one, or groups of them", params, cure)


def check_step_size(owner: str, *, lr: Any) -> None:
    """Refuse what is no step size.

    Args:
        owner: what the user has called.
        lr: the argument.

    Raises:
        ArgumentError: naming the argument.
    """
    check_numbers(owner, "at least 0", lambda x: x >= 0, "Use a positive step size.", lr=lr)


def check_decay(owner: str, *, weight_decay: Any) -> None:
    """Refuse what is no weight decay.

    Args:
        owner: what the user has called.
        weight_decay: the argument.

    Raises:
        ArgumentError: naming the argument.
    """
    check_numbers(owner, "at least 0", lambda x: x >= 0, "Use 0 for none.", weight_decay=weight_decay)


def check_adam(owner: str, params: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any = 0.0) -> None:
    """Refuse what Adam does not take.

    Args:
        owner: what the user has called.
        params: the argument, as the others.
        lr: step size.
        betas: decay of the moments.
        eps: added to the root of the second one.
        weight_decay: of the weights.

    Raises:
        ArgumentError: naming the argument.
    """
    check_parameters(owner, params)
    check_step_size(owner, lr=lr)
    pair = isinstance(betas, Sequence) and len(betas) == 2
    fits = pair and all(isinstance(b, (int, float)) and b is not True and 0 <= b < 1 for b in betas)
    if not fits:
        raise wrong(owner, "betas", "two numbers in [0, 1)", betas, "Use e.g. (0.9, 0.999).")
    check_numbers(owner, "at least 0", lambda x: x >= 0, "Use e.g. 1e-8.", eps=eps)
    check_decay(owner, weight_decay=weight_decay)
