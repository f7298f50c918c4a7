"""Optimizer state in formats of its own, which torch would lose when it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import LOAD_STATE_DICT_HOOKS, storage_key
from lightning_memtrain.optimizer_steps.optimizer_contents import containers_in, optimizers_in
from lightning_memtrain.precision.half_dtypes import HALF_DTYPES


def keep_state_dtypes(optimizer: Optimizer) -> Callable[[], None]:
    """Let ``load_state_dict`` keep the dtypes that were saved.

    ``Optimizer.load_state_dict`` casts all state to the dtype of its parameter, silently: codes in 8 bits
    become floats, and float32 moments of a bfloat16 parameter lose most of their digits.

    Args:
        optimizer: any; one with a ``load_state_dict`` of its own, which does without torch's hooks, is left
            to it.

    Returns:
        A function that takes it back.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
        >>> optimizer.state[weight]["momentum_buffer"] = torch.tensor([1 / 3, 2 / 3])
        >>> undo = keep_state_dtypes(optimizer)
        >>> optimizer.load_state_dict(optimizer.state_dict())
        >>> optimizer.state[weight]["momentum_buffer"].dtype
        torch.float32
    """
    if not hasattr(optimizer, LOAD_STATE_DICT_HOOKS):
        return _nothing
    loading: list[Mapping[str, Any]] = []

    def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
        loading[:] = [state_dict]

    def after(loaded: Optimizer) -> None:
        if loading:
            restore_state_dtypes(loaded, loading.pop())

    handles = (
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def restore_state_dtypes(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Put state tensors back that loading has cast to another dtype.

    Args:
        optimizer: has loaded ``state_dict``.
        state_dict: what was loaded.
    """
    indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, parameter in zip(indices, parameters, strict=True):
        if index in state_dict["state"]:
            optimizer.state[parameter] = _uncast(optimizer.state[parameter], state_dict["state"][index])


def _uncast(loaded: Any, saved: Any) -> Any:
    if isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _uncast(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        return type(saved)(_uncast(*pair) for pair in zip(loaded, saved, strict=True))
    return loaded


def upcast_state(optimizer: Optimizer) -> None:
    """Make state in half precision the float32 that it would have been, had the parameters been float32.

    Args:
        optimizer: e.g. ``torch.optim.Adagrad``, whose sums are made at its construction, in the dtype of the
            parameters, one that wraps another one and has copies of the weights from its construction, or
            one that has loaded moments of a run without float32 steps.
    """
    for inner in optimizers_in(optimizer):
        for parameter, state in inner.state.items():
            if isinstance(parameter, Tensor):
                inner.state[parameter] = _upcast(state)
    storages = {
        storage_key(p.untyped_storage())
        for inner in optimizers_in(optimizer)
        for group in inner.param_groups
        for p in group["params"]
    }
    for container in list(containers_in(optimizer)):
        for key, value in container.items:
            if not isinstance(value, Tensor) or value.dtype not in HALF_DTYPES:
                continue
            if (
                isinstance(container.value, (list, dict))
                and storage_key(value.untyped_storage()) not in storages
            ):
                container.value[key] = value.float()


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_DTYPES else value
    if isinstance(value, dict):
        return {key: _upcast(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_upcast(inner) for inner in value)
    return value


def _nothing() -> None:
    pass
