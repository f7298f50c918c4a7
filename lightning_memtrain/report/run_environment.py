"""What a reader of the report needs to know about the machine and the versions."""

from __future__ import annotations

import platform
from pathlib import Path

import lightning
import torch

from lightning_memtrain.__about__ import __version__


def environment(device: torch.device) -> dict[str, str]:
    """Describe the versions and the hardware of this process.

    Args:
        device: the device that was profiled.

    Returns:
        Versions of Python and of the packages that matter, the platform, the processor and the device.
    """
    described = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "lightning_memtrain": __version__,
        "platform": platform.platform(),
        "processor": _processor_name(Path("/proc/cpuinfo")),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["device_name"] = properties.name
        described["device_memory"] = f"{properties.total_memory / 2**30:.2f} GiB"
        described["cuda"] = str(torch.version.cuda)
    return described


def _processor_name(cpuinfo: Path) -> str:
    # platform.processor() is empty or just the architecture on Linux.
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
