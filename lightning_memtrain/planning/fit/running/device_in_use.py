"""The device that a run uses, and what it holds of it."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.tracing.device import Device


def device_of(device: torch.device) -> Device:
    """What a device of torch is for a plan.

    Args:
        device: on which a run trains.

    Returns:
        The GPU of that number, or this machine's memory.

    Raises:
        MisconfigurationException: if it is of another kind.
    """
    if device.type == "cpu":
        return Device.named("cpu")
    if device.type == "cuda":
        return Device.here(device.index or 0)
    raise MisconfigurationException(
        f"`FitMemory` must run on a GPU by NVIDIA or on the CPU, whose allocators it knows, but got a run on "
        f'{device.type}. Use Microbatching(microbatch_size="auto") there, which measures.'
    )


def reserved_on(device: torch.device) -> int | None:
    """What torch has reserved of a device by now, which is hardly ever given back.

    Args:
        device: on which a run trains.

    Returns:
        The bytes; ``None`` on the CPU, where nothing is taken ahead.
    """
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else None
