"""When gradients and buffers are communicated, if a batch has several forward and backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_memtrain.compat.torch_private import sync_ddp_buffers
from lightning_memtrain.coordination import sync_gradients


def fully_sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of a model to which FSDP2's ``fully_shard`` was applied."""
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


@contextmanager
def gradient_sync(strategy: Any, enabled: bool, waits_if_sharded: bool = False) -> Iterator[None]:
    """Average gradients over ranks in the backward of the block, or not.

    With ``static_graph`` DDP counts the uses of each parameter in its first backward, which goes wrong
    without communication (also in plain gradient accumulation), so there it is always on.

    FSDP2 always does unless it is told to wait, since each rank then holds gradients of all whole weights.
    """
    if waits_if_sharded and not enabled:
        modules = fully_sharded_modules(strategy.model)
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)
        return
    # `isinstance` would miss strategies of the package `pytorch_lightning`.
    blocks = not enabled and hasattr(strategy, "block_backward_sync")
    if not blocks or getattr(strategy.model, "static_graph", False):
        yield
        return
    with strategy.block_backward_sync():
        yield


def broadcast_buffers(model: Any) -> None:
    """Let DDP broadcast rank 0's buffers now, and not in the next forward.

    So the running statistics that the chunks start from are the ones that DDP would have started from, and no
    forward communicates.

    Args:
        model: that is trained, wrapped by DDP or not.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    if model.will_sync_module_buffers():  # type: ignore[no-untyped-call]
        sync_ddp_buffers(model)()
        model.require_forward_param_sync = False


class DelayedGradientSync:
    """Runs all chunks of a batch without communication, and then averages the gradients in one pass.

    So no rank waits inside of a backward for another one that ran out of memory: all ranks first agree that
    all chunks went well. As many all-reduces as without splitting, through the same reducer, buckets and
    communication hooks. Techniques that average by themselves after a backward are asked to do so then.

    Args:
        strategy: the trainer's strategy.
    """

    def __init__(self, strategy: Any) -> None:
        model = strategy.model
        self._ddp = model if isinstance(model, DistributedDataParallel) else None

    @property
    def needed(self) -> bool:
        """Whether there are ranks to wait for."""
        return self._ddp is not None

    def average_gradients(self) -> None:
        """Average over ranks what has been accumulated, unless gradients are still to be accumulated."""
        ddp = self._ddp
        if ddp is None or not ddp.require_backward_grad_sync:
            return
        held = [p for p in ddp.module.parameters() if p.requires_grad and p.grad is not None]
        if held:
            self._average_in_buckets(ddp, held)
        sync_gradients()

    def _average_in_buckets(self, ddp: DistributedDataParallel, held: list[nn.Parameter]) -> None:
        module = ddp.module
        module.forward = lambda nothing: _Touch.apply(*held)  # type: ignore[no-untyped-call]
        try:
            loss = ddp(None)  # on a GPU it moves its arguments, and fails without any
        finally:
            del module.__dict__["forward"]
        loss.backward()


class _Touch(torch.autograd.Function):
    """A zero that depends on all parameters with gradient zero: its backward only triggers the reducer."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return tuple(
            torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like
        )
