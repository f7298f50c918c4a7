"""A module put on the twin: other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_memtrain.compat.lightning_packages import namesake
from lightning_memtrain.compat.torch_private import FakeTensor, swap_tensor_impl
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE, TwinDeviceMode
from lightning_memtrain.tracing.user_state.capture import UserState


def move(model: nn.Module, mode: TwinDeviceMode, device: str = DEVICE_TYPE) -> None:
    """Put tensors without data in the place of a module's parameters and buffers, wherever they are held.

    Args:
        model: any module, with or without data.
        mode: makes the tensors.
        device: where they are; ``"cpu"`` if it is the user's code that moves them.
    """
    twins: dict[int, Tensor] = {}
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(mode.moved(parameter, device), parameter.requires_grad)
    for buffer in [*model.buffers(), *_states_of_metrics(model)]:
        twins[id(buffer)] = twin = mode.moved(buffer, device)
        real = mode.known.real_or_known(buffer)
        if real is not None and real.device.type == "cpu":
            mode.known.set(twin, real.detach())
    UserState(model).replace(twins)


def _states_of_metrics(model: nn.Module) -> Iterator[Tensor]:
    """What metrics gather, which goes where their module goes, though it is neither parameter nor buffer."""
    for module in model.modules():
        if isinstance(module, Metric):
            for state in module.metric_state.values():
                yield from [state] if isinstance(state, Tensor) else state


def configure_without_data(
    model: pl.LightningModule, mode: AbstractContextManager[Any], before: Callable[[], None] = lambda: None
) -> None:
    """Let a module's ``configure_model`` make its layers without data.

    Args:
        model: any.
        mode: in which it is to be called.
        before: called right before it, when all callbacks have been set up.
    """
    if not namesake(is_overridden, model)("configure_model", model):
        return
    configure = model.configure_model

    def configure_model() -> None:
        before()
        with mode:
            configure()

    model.configure_model = configure_model  # type: ignore[method-assign]


def replace_when_moved() -> None:
    """Let ``module.to(...)`` put other tensors in the place of a module's, for the rest of this process.

    Torch's own writes into the tensors that are there, which those without data do not allow.
    """
    nn.Module._apply = _apply  # type: ignore[method-assign]
    FakeTensor.data = property(_data, _set_data)  # type: ignore[assignment]


_plain_data: Any = vars(torch._C.TensorBase)["data"]


def _data(self: Tensor) -> Tensor:
    found: Tensor = _plain_data.__get__(self)
    return found


def _set_data(self: Any, value: Tensor) -> None:
    """As torch's own, which does not let a tensor without data come to another device."""
    if not isinstance(value, FakeTensor) or value.device == self.device:
        _plain_data.__set__(self, value)
        return
    other = value.detach().requires_grad_(self.requires_grad)
    swap_tensor_impl(self, other)
    self.fake_device = value.device


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
