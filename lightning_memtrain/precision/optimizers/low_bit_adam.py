"""Adam with moments in 8 or 4 bits, from the packages that have it."""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_memtrain.precision.optimizers.optimizer_arguments import check_adam
from lightning_memtrain.precision.optimizers.sharded_parameters import validate_unsharded


def adam8bit(
    params: ParamsT, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Optimizer:
    """Adam with moments in 8 bits, by bitsandbytes: 2.04 bytes per parameter instead of 8.

    Parameters of fewer than 4096 numbers keep theirs in float32. There is no weight decay, since that of
    bitsandbytes' Adam is AdamW's: use :func:`adamw8bit`.

    Args:
        params: parameters or groups of them.
        lr: step size, at least 0.
        betas: decay of the first and of the second moment, each in ``[0, 1)``.
        eps: added to the root of the second moment, greater than 0.

    Returns:
        A ``bitsandbytes.optim.Adam8bit``.

    Raises:
        ModuleNotFoundError: if bitsandbytes is missing; names the extra to install.
        ArgumentError: if an argument is out of its range, or a parameter is sharded, as under FSDP2.
    """
    check_adam("adam8bit", params, lr, betas, eps)
    optim: Any = _imported("adam8bit", "bitsandbytes", "bnb")
    made: Optimizer = optim.Adam8bit(params, lr=lr, betas=betas, eps=eps)
    return _whole("adam8bit", made)


def adamw8bit(
    params: ParamsT,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """AdamW with moments in 8 bits, by bitsandbytes: 2.04 bytes per parameter instead of 8.

    Parameters of fewer than 4096 numbers keep theirs in float32.

    Args:
        params: parameters or groups of them.
        lr: step size, at least 0.
        betas: decay of the first and of the second moment, each in ``[0, 1)``.
        eps: added to the root of the second moment, greater than 0.
        weight_decay: part of the weights that a step takes off, times ``lr``; at least 0.

    Returns:
        A ``bitsandbytes.optim.AdamW8bit``.

    Raises:
        ModuleNotFoundError: if bitsandbytes is missing; names the extra to install.
        ArgumentError: if an argument is out of its range, or a parameter is sharded, as under FSDP2.
    """
    check_adam("adamw8bit", params, lr, betas, eps, weight_decay)
    optim: Any = _imported("adamw8bit", "bitsandbytes", "bnb")
    made: Optimizer = optim.AdamW8bit(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return _whole("adamw8bit", made)


def adamw4bit(
    params: ParamsT,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """AdamW with moments in 4 bits, by torchao: 1.07 bytes per parameter instead of 8.

    It compiles its step, on CPU with a C++ compiler, which takes seconds for each shape of a parameter.
    Parameters of fewer than 4096 numbers, and those whose number is not divisible by 128, keep their moments
    in float32. Its learning rate is a tensor, which Lightning's ``Tuner.lr_find`` cannot handle.

    Args:
        params: parameters or groups of them.
        lr: step size, at least 0.
        betas: decay of the first and of the second moment, each in ``[0, 1)``.
        eps: added to the root of the second moment, greater than 0.
        weight_decay: part of the weights that a step takes off, times ``lr``; at least 0.

    Returns:
        A ``torchao.optim.AdamW4bit``.

    Raises:
        ModuleNotFoundError: if torchao is missing; names the extra to install.
        ArgumentError: if an argument is out of its range.
    """
    check_adam("adamw4bit", params, lr, betas, eps, weight_decay)
    optim: Any = _imported("adamw4bit", "torchao", "ao")
    made: Optimizer = optim.AdamW4bit(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return made


def _whole(name: str, optimizer: Optimizer) -> Optimizer:
    validate_unsharded(name, (p for group in optimizer.param_groups for p in group["params"]))
    return optimizer


def _imported(name: str, package: str, extra: str) -> Any:
    """The package's optimizers, without what it says of accelerators that are not there."""
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            return import_module(f"{package}.optim")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"`{name}` needs {package}, which is not installed. "
            f'Install it with `pip install "lightning-memtrain[{extra}]"`.',
            name=error.name,
        ) from error
    finally:
        logging.disable(disabled)
