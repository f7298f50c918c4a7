"""The twin, as Lightning sees it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator

from lightning_memtrain.compat.lightning_packages import namesake
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE


class TwinAccelerator(Accelerator):
    """There is one twin, always, with nothing to set up or to take down."""

    def setup_device(self, device: torch.device) -> None:
        """There is nothing to set up."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """It has none."""
        return {}

    def teardown(self) -> None:
        """There is nothing to take down."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """As they are given."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """One by one."""
        return [torch.device(DEVICE_TYPE, index) for index in range(int(devices))]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def name() -> str:
        """As torch calls it."""
        return DEVICE_TYPE


def twin_accelerator(like: object) -> Accelerator:
    """The twin for a trainer of either package.

    Args:
        like: a module of the trainer's package.

    Returns:
        The accelerator.
    """
    theirs = namesake(Accelerator, like)
    kind = (
        TwinAccelerator if theirs is Accelerator else type("TwinAccelerator", (TwinAccelerator, theirs), {})
    )
    found: Accelerator = kind()
    return found
