"""Which storages hold parameters, buffers, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_memtrain.core import Category
from lightning_memtrain.ledger.storage_tracker import StorageTracker
from lightning_memtrain.ledger.tensors.distributed_tensors import ddp_around, ddp_buckets, unsharded_gradients
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors


def classify_training_state(
    tracker: StorageTracker,
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    modules: Sequence[tuple[str, nn.Module]],
) -> None:
    """Find parameters, buffers, gradients and optimizer state again; any of them may be a new storage.

    Args:
        tracker: knows the storages.
        model: the module that is trained.
        optimizers: its optimizers.
        modules: of the model, as :func:`~.submodules.named_submodules` lists them.
    """
    classify_buckets(tracker, model)  # before gradients, which may lie in them
    for gradient in unsharded_gradients(module for _, module in modules):
        tracker.classify(gradient, Category.UNSHARDED_GRADIENTS, None)
    owners: dict[int, str] = {}
    for owner, module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), owner)
                tracker.classify(parameter, Category.PARAMETERS, owner)
                if (grad := parameter.grad) is not None:
                    tracker.classify(grad, Category.GRADIENTS, owner)
    for owner, module in modules:
        for buffer in module._buffers.values():
            if buffer is not None:
                tracker.classify(buffer, Category.BUFFERS, owner)
    for optimizer in optimizers:
        for key, state in optimizer.state.items():
            owner = owners.get(id(key), "")
            for value in state.values() if isinstance(state, dict) else (state,):
                for tensor in (value,) if isinstance(value, torch.Tensor) else find_tensors(value):
                    tracker.classify(tensor, Category.OPTIMIZER_STATE, owner)


def classify_buckets(tracker: StorageTracker, model: nn.Module) -> None:
    """Find the buckets of DDP, which makes them anew in the forward after its first backward.

    Args:
        tracker: knows the storages.
        model: the module that is trained.
    """
    wrapper = ddp_around(model)
    for bucket in () if wrapper is None else ddp_buckets(wrapper):
        tracker.classify(bucket, Category.BUCKETS, None)


def state_bytes(optimizers: Sequence[Optimizer]) -> int:
    """What optimizers hold beside parameters and gradients.

    Args:
        optimizers: any.

    Returns:
        The bytes of the tensors in their state.
    """
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(tensor.nbytes for tensor in tensors_in(states))
