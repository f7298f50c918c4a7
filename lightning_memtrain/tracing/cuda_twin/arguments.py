"""What programs call a CUDA device by, led to the twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE


class CudaMeansTwin(TorchFunctionMode):
    """``device="cuda"``, ``tensor.cuda()`` and ``tensor.is_cuda`` mean the twin."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0].to(DEVICE_TYPE)
        if func is Tensor.is_cuda.__get__:
            return args[0].device.type == DEVICE_TYPE
        if any(map(_names_cuda, args)) or any(map(_names_cuda, kwargs.values())):
            args = tuple(DEVICE_TYPE if _names_cuda(value) else value for value in args)
            kwargs = {key: DEVICE_TYPE if _names_cuda(value) else value for key, value in kwargs.items()}
        if func in _FROM_VALUES and _is_twin(kwargs.get("device")):
            # Torch fills it by a copy that no mode sees.
            options = {key: value for key, value in kwargs.items() if key not in ("device", "requires_grad")}
            made = func(*args, **options, device="cpu").to(DEVICE_TYPE)
            return made.requires_grad_(bool(kwargs.get("requires_grad")))
        if func is Tensor.new_tensor and "device" not in kwargs and _is_twin(args[0].device):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}, device="cpu").to(DEVICE_TYPE)
        return func(*args, **kwargs)


_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)


def _is_twin(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == DEVICE_TYPE


def _names_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
