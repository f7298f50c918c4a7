"""Which tensors several processes exchange: DDP's buckets, and what FSDP2 gathers and reduces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_memtrain.compat.lightning_private import trainer_of
from lightning_memtrain.compat.torch_private import (
    TorchDispatchMode,
    active_ddp_module,
    fsdp_parameters,
    gradients_of_fsdp_parameter,
    zeros_like_grad_buckets,
)


def ddp_around(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper that averages a model's gradients.

    Args:
        model: the wrapper itself, a module that its trainer has wrapped, or one whose forward it is running.

    Returns:
        The wrapper; ``None`` if there is none or it is not within reach.
    """
    trainer = trainer_of(model)
    running = active_ddp_module()
    for found in (model, getattr(getattr(trainer, "strategy", None), "model", None), running):
        if isinstance(found, DistributedDataParallel) and (found is model or found.module is model):
            return found
    return None


def ddp_buckets(wrapper: DistributedDataParallel) -> list[Tensor]:
    """The tensors in which DDP averages gradients; it holds them from its making to its end.

    They are never shown in Python. Asked for zeros like them, DDP gives them to an operator, which is where
    they can be met; nothing is allocated.

    Args:
        wrapper: any.

    Returns:
        Its buckets, but for those of sparse gradients, which are averaged as they are.
    """
    met = _Met()
    with met, suppress(RuntimeError, AttributeError):  # a bucket for sparse gradients has no tensor
        zeros_like_grad_buckets(wrapper.reducer)()
    return met.tensors


def gradients_lie_in_buckets(model: nn.Module) -> bool:
    """Whether gradients take no memory of their own once they are averaged.

    Args:
        model: as in :func:`ddp_around`.

    Returns:
        Whether they are views of DDP's buckets.
    """
    wrapper = ddp_around(model)
    return wrapper is not None and bool(wrapper.gradient_as_bucket_view)


class _Met(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Meets arguments of operators, and gives the first back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[Tensor] = []
        """What was met."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors.append(args[0])
        return args[0]


def unsharded_gradients(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Gradients of whole weights that FSDP2 has not reduced yet, since it was told to wait.

    Args:
        modules: any.

    Yields:
        Each of them.
    """
    for module in modules:
        for parameter in fsdp_parameters(module):
            yield from gradients_of_fsdp_parameter(parameter)
