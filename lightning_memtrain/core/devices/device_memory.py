"""What a device has."""

from __future__ import annotations

from typing import Any

import torch


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still use on a device, with those that it uses already.

    Args:
        device: any device.

    Returns:
        The bytes; ``None`` where the device does not tell (the CPU, which lends more than it has).

    Example:
        >>> free_device_bytes(torch.device("cpu")) is None
        True
    """
    if device.type == "mps":
        return _mps_bytes()
    module = _backend(device)
    if module is None:
        return None
    free_bytes, _ = module.mem_get_info(device)
    return int(free_bytes + module.memory_reserved(device))


def total_device_bytes(device: torch.device) -> int | None:
    """Bytes that torch can use on a device, whoever uses them at the moment.

    On CUDA it is all that the driver gives to programs, or the part of it that
    ``torch.cuda.set_per_process_memory_fraction`` leaves to this process; on MPS what Metal recommends at
    most.

    Args:
        device: any device.

    Returns:
        The bytes; ``None`` where the device does not tell (the CPU, which lends more than it has).

    Example:
        >>> total_device_bytes(torch.device("cpu")) is None
        True
    """
    if device.type == "mps":
        return _mps_bytes()
    module = _backend(device)
    if module is None:
        return None
    _, total_bytes = module.mem_get_info(device)
    # Newer than the oldest torch that is supported; without it, the part cannot be told.
    fraction = getattr(module, "get_per_process_memory_fraction", None)
    if fraction is not None and module.is_initialized():
        return int(total_bytes * fraction(device))
    return int(total_bytes)


def allocated_device_bytes(device: torch.device) -> int | None:
    """Bytes that tensors of this process have on a device now.

    Args:
        device: any device.

    Returns:
        The bytes; ``None`` where nobody counts them, as on the CPU.

    Example:
        >>> allocated_device_bytes(torch.device("cpu")) is None
        True
    """
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "memory_allocated"):
        return None
    return int(module.memory_allocated(device))


def _mps_bytes() -> int:
    return int(torch.mps.recommended_max_memory())


def _backend(device: torch.device) -> Any:
    """The module of torch that tells what a device has; ``None`` where none does."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "mem_get_info") else None
