"""Devices that are treated alike."""

from __future__ import annotations

from typing import Any

import torch


def behaves_as_cuda(device: torch.device) -> bool:
    """Whether what is done on CUDA alone is to be done on a device: on CUDA itself, and on a twin of it.

    Args:
        device: any device.

    Returns:
        Whether it is one of them.

    Example:
        >>> behaves_as_cuda(torch.device("cpu"))
        False
    """
    module: Any = getattr(torch, device.type, None)
    return device.type == "cuda" or getattr(module, "behaves_as_cuda", False) is True
