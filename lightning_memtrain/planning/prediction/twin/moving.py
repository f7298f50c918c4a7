"""A module put on the twin: other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_memtrain.tracing.cuda_twin import TwinDeviceMode
from lightning_memtrain.tracing.user_state.capture import UserState


def move(model: nn.Module, mode: TwinDeviceMode) -> None:
    """Put twins in the place of a module's parameters and buffers, wherever they are held.

    Args:
        model: any module, with or without data.
        mode: makes the twins.
    """
    twins: dict[int, Tensor] = {}
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(mode.moved(parameter), parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = twin = mode.moved(buffer)
        real = mode.known.real_or_known(buffer)
        if real is not None and real.device.type == "cpu":
            mode.known.set(twin, real.detach())
    UserState(model).replace(twins)


def replace_when_moved() -> None:
    """Let ``module.to(...)`` put other tensors in the place of a module's, for the rest of this process.

    Torch's own writes into the tensors that are there, which those without data do not allow.
    """
    nn.Module._apply = _apply  # type: ignore[method-assign]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's own, but that other tensors take the place of parameters, shared ones once."""
    memo: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            with torch.no_grad():
                memo[id(tensor)] = fn(tensor)
        return memo[id(tensor)]

    for module in self.modules() if recurse else [self]:
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            now = changed(parameter)
            if now is not parameter:
                if not isinstance(now, nn.Parameter):
                    now = memo[id(parameter)] = nn.Parameter(now, parameter.requires_grad)
                module._parameters[key] = now
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = changed(buffer)
    return self
