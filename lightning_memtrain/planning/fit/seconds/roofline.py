"""Seconds of operators on a GPU that is not here: the most that its data sheet lets hope for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from lightning_memtrain.compat.torch_private import disable_current_modes, tree_leaves
from lightning_memtrain.ledger.observers.dispatch_mode import traits_of
from lightning_memtrain.ledger.operators.workspace import OpCall
from lightning_memtrain.tracing.device import Device

# What eager PyTorch needs to launch a kernel; shorter ones wait for the next launch.
_LAUNCH_SECONDS = 8e-6
# How much of the data sheet's figures operators reach.
_OF_PEAK_OPERATIONS = 0.6
_OF_PEAK_BANDWIDTH = 0.8


@dataclass(frozen=True)
class Speed:
    """What a data sheet says.

    Args:
        float32: operations of float32 in a second, without tensor cores.
        half: operations of float16 or bfloat16 in a second, dense.
        bandwidth: bytes of memory in a second.
    """

    float32: float
    half: float
    bandwidth: float


def _speed(float32_tera: float, half_tera: float, gigabytes: float) -> Speed:
    return Speed(float32_tera * 1e12, half_tera * 1e12, gigabytes * 1e9)


#: Nominal speeds, by the beginning of a device's name; written down without a check against device or sheet.
SPEEDS = {
    "GTX 1080 Ti": _speed(11.3, 11.3, 484),
    "RTX 2080 Ti": _speed(13.4, 53.8, 616),
    "RTX 3060": _speed(12.7, 51.2, 360),
    "RTX 3080": _speed(29.8, 119, 760),
    "RTX 3090": _speed(35.6, 142, 936),
    "RTX 4060 Ti": _speed(22.1, 88, 288),
    "RTX 4070": _speed(29.1, 117, 504),
    "RTX 4080": _speed(48.7, 195, 717),
    "RTX 4090": _speed(82.6, 165, 1008),
    "RTX 5090": _speed(104.8, 210, 1792),
    "RTX A6000": _speed(38.7, 155, 768),
    "RTX 6000 Ada": _speed(91.1, 364, 960),
    "T4": _speed(8.1, 65, 320),
    "P100": _speed(9.3, 18.7, 732),
    "V100": _speed(15.7, 125, 900),
    "A10 ": _speed(31.2, 125, 600),
    "L4 ": _speed(30.3, 121, 300),
    "L40": _speed(90.5, 362, 864),
    "A100": _speed(19.5, 312, 1555),
    "H100": _speed(67, 989, 3350),
    "H200": _speed(67, 989, 4800),
}
#: Of a GPU that is not in the list.
UNKNOWN = _speed(20, 80, 700)


class RooflineSeconds:
    """The roofline of each operator: its operations, its bytes or its launch, whichever takes longest.

    Args:
        device: the GPU.
    """

    def __init__(self, device: Device) -> None:
        found = [speed for name, speed in SPEEDS.items() if device.name.startswith(name)]
        self._speed = found[0] if found else UNKNOWN
        self.is_known = bool(found)
        """Whether the GPU's data sheet is."""
        self.overhead_seconds = _LAUNCH_SECONDS
        self._seconds: dict[OpCall, float] = {}

    def seconds(self, calls: Iterable[OpCall]) -> float:
        """Seconds that all of the calls take together.

        Args:
            calls: with repetitions; those that only make views take none.

        Returns:
            The sum.
        """
        return sum(self._of(call) for call in calls if not traits_of(call.func).makes_views)

    def _of(self, call: OpCall) -> float:
        if call not in self._seconds:
            self._seconds[call] = self._estimate(call)
        return self._seconds[call]

    def _estimate(self, call: OpCall) -> float:
        try:
            with disable_current_modes(), torch.no_grad():
                args, kwargs = call.make_arguments(torch.device("meta"))
                result = call.func(*args, **kwargs)
        except Exception:  # no rule for tensors without data
            return _LAUNCH_SECONDS
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        num_bytes = sum(prod(one.shape) * one.element_size() for one in tensors)
        count = flop_registry.get(call.func.overloadpacket)  # type: ignore[attr-defined]
        operations = _counted(count, args, kwargs, result)
        is_half = any(one.dtype in (torch.float16, torch.bfloat16) for one in tensors)
        speed = self._speed.half if is_half else self._speed.float32
        return max(
            _LAUNCH_SECONDS,
            operations / (speed * _OF_PEAK_OPERATIONS),
            num_bytes / (self._speed.bandwidth * _OF_PEAK_BANDWIDTH),
        )


def _counted(count: Any, args: Any, kwargs: Any, result: Any) -> float:
    if count is None:
        return 0.0
    try:
        return float(count(*args, **kwargs, out_val=result))
    except Exception:  # a formula for other arguments
        return 0.0
