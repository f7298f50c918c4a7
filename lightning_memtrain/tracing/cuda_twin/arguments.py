"""What programs call a CUDA device by, led to the twin."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE

_IS_CUDA: Any = Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class CudaMeansTwin(TorchFunctionMode):
    """``device="cuda"``, ``tensor.cuda()`` and ``tensor.is_cuda`` mean the twin."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0].to(DEVICE_TYPE)
        if func == _IS_CUDA:
            return args[0].device.type == DEVICE_TYPE
        if any(map(_names_cuda, args)) or any(map(_names_cuda, kwargs.values())):
            args = tuple(DEVICE_TYPE if _names_cuda(value) else value for value in args)
            kwargs = {key: DEVICE_TYPE if _names_cuda(value) else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def make_from_values() -> None:
    """Let ``torch.tensor`` and its like make tensors on the twin, for the rest of this process.

    Torch fills them by a copy that no mode sees.
    """
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _on_cpu_first(getattr(torch, name)))
    Tensor.new_tensor = _new_tensor  # type: ignore[method-assign, assignment]


def _on_cpu_first(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if not (_is_twin(device) or _names_cuda(device)):
            return make(*args, **kwargs)
        trains = bool(kwargs.pop("requires_grad", False))
        return make(*args, **{**kwargs, "device": "cpu"}).to(DEVICE_TYPE).requires_grad_(trains)

    return made


def _new_tensor(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
    return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})


def _is_twin(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == DEVICE_TYPE


def _names_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
