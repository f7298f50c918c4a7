"""On which devices a model is."""

from __future__ import annotations

import torch
from torch import nn

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.ledger.submodules import named_submodules


def parameter_devices(model: nn.Module) -> dict[torch.device, str]:
    """The devices on which a model's parameters are, each with the name of the first one there.

    Args:
        model: any module.

    Returns:
        Names by device, in the order of the model.
    """
    devices: dict[torch.device, str] = {}
    for path, module in named_submodules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device not in devices:
                devices[parameter.device] = f"{path}.{name}" if path else name
    return devices


def parameter_device(model: nn.Module) -> torch.device:
    """The one device on which a model's parameters are.

    Args:
        model: any module.

    Returns:
        The device, with its index.

    Raises:
        ArgumentError: if there are no parameters, or parameters on two devices.
    """
    devices = parameter_devices(model)
    if not devices:
        raise ArgumentError(
            f"`MemoryLedger(model)` must have parameters, which decide on the device to count on, "
            f"but got a {type(model).__name__} with none. "
            "Pass `device=...`, or build the model before the ledger (in `configure_model`, for instance)."
        )
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ArgumentError(
            f"`MemoryLedger(model)` must have all parameters on one device, but got {found}. "
            "Move the model to one device, or pass `device=...` to count on one of them."
        )
    return next(iter(devices))
