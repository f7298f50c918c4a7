"""What one batch changes before the optimizer steps, kept so that it can be run again from the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memtrain.core import keep_all
from lightning_memtrain.techniques.microbatching.metric_states import MetricStates


class BatchSnapshot:
    """State of random numbers, buffers, metrics, gradients and loss scaler before the forward of a batch.

    Parameters and optimizer state are not among them: nothing writes to them before the optimizer does.
    Buffers are copied on their device; gradients only where there are some, that is, amid an accumulation
    window. Other techniques are told, and go back to what they had gathered. Attributes of the model that are
    neither are not restored.

    Args:
        model: the module that is trained.
        grad_scaler: loss scaler of mixed precision, ``None`` without one.
        device: the device whose generator is kept, beside the CPU's.
        spared: buffers that are not to be set back.
    """

    def __init__(
        self, model: nn.Module, grad_scaler: Any, device: torch.device, spared: Iterable[Tensor] = ()
    ) -> None:
        left_out = {id(buffer) for buffer in spared}
        self._device = device
        self._rng = _rng_state(device)
        self._buffers = [
            (buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in left_out
        ]
        self._gradients = [
            (p, p.grad, None if p.grad is None else p.grad.detach().clone())
            for p in model.parameters()
            if p.requires_grad
        ]
        self._metrics = MetricStates(model)
        self._others = keep_all()
        self._restore_scaler = _scaler_restorer(grad_scaler)

    def num_bytes(self, amid_window: bool) -> int:
        """What is kept, in bytes of the device.

        Args:
            amid_window: count a copy of all gradients, even if there are none yet.

        Returns:
            The bytes.
        """
        kept = [*self._rng, *(copied for _, copied in self._buffers), *self._metrics.tensors()]
        kept += [tensor for one in self._others for tensor in one.tensors]
        kept += [p if amid_window else value for p, _, value in self._gradients]
        return sum(x.nbytes for x in kept if x is not None and x.device.type == self._device.type)

    @torch.no_grad()
    def restore(self) -> None:
        """Set everything back to what it was. May be called several times."""
        _set_rng_state(self._device, self._rng)
        for buffer, copied in self._buffers:
            buffer.copy_(copied)
        for parameter, gradient, value in self._gradients:
            parameter.grad = gradient
            if gradient is not None and value is not None:
                gradient.copy_(value)
        self._metrics.restore()
        for other in self._others:
            other.restore()
        self._restore_scaler()


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = None if device.type == "cpu" else getattr(torch, device.type).get_rng_state(*_index(device))
    return torch.get_rng_state(), on_device


def _set_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    on_device = state[1]
    if on_device is not None:
        getattr(torch, device.type).set_rng_state(on_device, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch.mps has one device and takes no argument


def _scaler_restorer(scaler: Any) -> Callable[[], None]:
    # Before the optimizer steps, a scaler changes only by making its scale when it is first used.
    if scaler is None or getattr(scaler, "_scale", 0) is not None:
        return lambda: None

    def forget_scale() -> None:
        scaler._scale = None
        scaler._growth_tracker = None

    return forget_scale
