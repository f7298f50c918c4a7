"""What a device has for a training run, from a list or from this machine."""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_memtrain.core import MIB, ArgumentError, format_bytes, parse_bytes
from lightning_memtrain.core.arguments.value_checks import is_whole, wrong

# What torch takes for cuBLAS, and again for cuBLASLt, once per handle and stream (`CublasHandlePool.cpp`):
# `:4096:2:16:8` of CUBLAS_WORKSPACE_CONFIG, two pieces of 4096 KiB and eight of 16, ...
WORKSPACE_BYTES = (2 * 4096 + 8 * 16) * 1024
# ... and what NVIDIA recommends from Hopper on (pytorch#89027; Blackwell since pytorch#175344, 2026-02).
HOPPER_WORKSPACE_BYTES = 32 * MIB

# nvidia-smi and data sheets show what the driver keeps for itself, too. Torch saw 1.3 % (L40S), 1.5 % (RTX
# 4090), 2.2 % (A10) and 2.9 % (T4) less.
_DRIVER_SHARE = 0.03
# Without a driver's file there is no GPU: by NVIDIA (in a Jetson, too), by AMD, of Windows under Linux.
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
_CONTEXT_BYTES = 512 * MIB
_CONTEXT_SOURCE = (
    "an estimate: out-of-memory messages on RTX 4090 leave 0.46 and 0.49 GiB outside of torch's allocator "
    "(pinokiofactory/flux-webui#11, 3DTopia/Phidias-Diffusion#8); it grows with the kernels that are loaded, "
    "and other cards may differ (pytorch#107667)"
)


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """What torch takes for cuBLAS on a GPU, and as much again for cuBLASLt, when each is first used.

    Args:
        compute_capability: of the GPU, e.g. ``(8, 0)`` for A100.

    Returns:
        Bytes, where CUBLAS_WORKSPACE_CONFIG is not set.
    """
    return HOPPER_WORKSPACE_BYTES if compute_capability >= (9, 0) else WORKSPACE_BYTES


@dataclass(frozen=True)
class Device:
    """A device, as far as memory is concerned.

    Args:
        name: what it is called.
        total_bytes: its memory, in bytes or as ``"24GiB"``.
        source: where ``total_bytes`` is from.
        driver_bytes: what of it torch never sees; 0 where ``total_bytes`` is what torch shows.
        context_bytes: what a process needs on it besides tensors: the CUDA context, and kernels.
        context_source: where ``context_bytes`` is from.
        compute_capability: of a GPU by NVIDIA, else ``None``.

    Example:
        >>> device = Device.named("RTX 4090")
        >>> device.name, device.cublas_workspace_bytes
        ('RTX 4090 24GB', 8519680)
    """

    name: str
    total_bytes: int
    source: str = "given"
    driver_bytes: int = 0
    context_bytes: int = 0
    context_source: str = "none"
    compute_capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise wrong("Device", "name", "what it is called", self.name, "Write e.g. 'RTX 4090'.")
        # As in all places: a number of bytes or a text with its unit.
        total_bytes = parse_bytes(self.total_bytes, argument="Device(total_bytes)")
        object.__setattr__(self, "total_bytes", total_bytes)
        for name in ("driver_bytes", "context_bytes"):
            value = getattr(self, name)
            none = is_whole(value) and value == 0
            size = 0 if none else parse_bytes(value, argument=f"Device({name})")
            object.__setattr__(self, name, size)
        capability = self.compute_capability
        if capability is not None and not _is_pair(capability):
            cure = "Write e.g. (8, 9); leave it out for what is no GPU by NVIDIA."
            raise wrong("Device", "compute_capability", "two whole numbers", capability, cure)
        if self.usable_bytes < 1:
            raise ArgumentError(
                "`Device(driver_bytes, context_bytes)` must leave something of the total of "
                f"{format_bytes(self.total_bytes)}, but got {format_bytes(self.driver_bytes)} and "
                f"{format_bytes(self.context_bytes)}. Lower them."
            )

    @property
    def usable_bytes(self) -> int:
        """What torch's allocator can reserve: the total less what driver and context take."""
        return self.total_bytes - self.driver_bytes - self.context_bytes

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU by NVIDIA."""
        return self.compute_capability is not None

    @property
    def is_cpu(self) -> bool:
        """Whether it is a machine's own memory: ``"cpu"`` is a word of its name."""
        return not self.is_cuda and "cpu" in _words(self.name)

    @property
    def cublas_workspace_bytes(self) -> int:
        """What torch's allocator holds for cuBLAS once a matrix product has run; 0 on CPU."""
        return 0 if self.compute_capability is None else workspace_bytes(self.compute_capability)

    @property
    def cublaslt_workspace_bytes(self) -> int:
        """What it holds besides for cuBLASLt, which linear layers with a bias use; 0 on CPU."""
        return self.cublas_workspace_bytes

    @classmethod
    def named(cls, name: str) -> Device:
        """A device of the list.

        Args:
            name: a name that ``memtrain devices`` lists, or as much of it as tells it from the others:
                ``"RTX 4090"``, ``"a100 80gb"``. ``"cpu"`` is this machine's memory.

        Returns:
            The device.

        Raises:
            ArgumentError: if there is none of that name, or several.
        """
        words = _words(name)
        if words == ["cpu"]:
            return _cpu()
        exact = [device for device in PRESETS if sorted(_words(device.name)) == sorted(words)]
        found = exact or [device for device in PRESETS if words and set(words) <= set(_words(device.name))]
        if len(found) == 1:
            return found[0]
        names = {device.name.lower(): device.name for device in PRESETS} | {"cpu": "cpu"}
        if found:
            rest = f"which may be any of {', '.join(device.name for device in found)}. Name one of these."
        else:
            nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.3)
            hint = f" Did you mean {names[nearest[0]]!r}?" if nearest else ""
            rest = f"which is none.{hint} `memtrain devices` lists all; use `Device(name, total_bytes)` else."
        raise ArgumentError(
            f"`Device.named(name)` must be the name of a device of the list, but got {name!r}, {rest}"
        )

    @classmethod
    def here(cls, index: int = 0) -> Device:
        """What this machine has: its GPU by NVIDIA, or else its memory.

        Args:
            index: which GPU.

        Returns:
            The device.

        Raises:
            ArgumentError: if there are GPUs, but none of that number.
        """
        if not _may_have_gpu():
            return _cpu()
        import torch

        if not torch.cuda.is_available():
            return _cpu()
        if not 0 <= index < torch.cuda.device_count():
            raise ArgumentError(
                f"`Device.here(index)` must be the number of a GPU of this machine, 0 to "
                f"{torch.cuda.device_count() - 1}, but got {index}."
            )
        properties = torch.cuda.get_device_properties(index)
        return cls(
            name=properties.name,
            total_bytes=properties.total_memory,
            source="torch on this machine",
            context_bytes=_CONTEXT_BYTES,
            context_source=_CONTEXT_SOURCE,
            # Torch calls AMD's GPUs "cuda", too, whose kernels and libraries are others.
            compute_capability=None if torch.version.hip else (properties.major, properties.minor),
        )


def _may_have_gpu() -> bool:
    """Whether torch, whose import takes seconds, has to be asked for a GPU."""
    if "torch" in sys.modules or sys.platform != "linux":
        return True
    return any(Path(file).exists() for file in _GPU_FILES)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_whole, value))


def _words(name: str) -> list[str]:
    """The words of a name, so that ``"rtx4090"`` is ``"RTX 4090"``; makers and series are left out."""
    joined = re.sub(r"(\d) +gb", r"\1gb", name.lower())
    words = re.findall(r"[rg]tx|\d+(?=ti)|[a-z0-9]+", joined)
    return [word for word in words if word not in ("nvidia", "geforce", "tesla")]


def _cpu() -> Device:
    """This machine's memory, or what its container may have of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _container_limit(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None and limit < total:
        return Device("cpu", limit, source="limit of this container")
    return Device("cpu", total, source="memory of this machine")


def available_bytes() -> int | None:
    """What other programs leave of this machine's memory now; ``None`` where the system does not say."""
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def resident_bytes() -> int:
    """What this process has in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the most that it had
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _container_limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such limit: no file, or the word "max"
        return None


def _seen_by_torch(name: str, gib: float, capability: tuple[int, int], where: str) -> Device:
    # Messages have two decimals; the lower end, so that what fits here fits there.
    total_bytes = int((gib - 0.005) * 1024) * MIB
    return _gpu(name, total_bytes, 0, capability, f"torch's messages ({where})")


def _shown_by_nvidia_smi(name: str, mib: int, capability: tuple[int, int], where: str) -> Device:
    total_bytes = mib * MIB
    return _gpu(name, total_bytes, int(total_bytes * _DRIVER_SHARE), capability, f"nvidia-smi ({where})")


def _nominal(name: str, total_bytes: int, capability: tuple[int, int]) -> Device:
    return _gpu(name, total_bytes, int(total_bytes * _DRIVER_SHARE), capability, "nominal")


def _gpu(name: str, total_bytes: int, driver_bytes: int, capability: tuple[int, int], source: str) -> Device:
    return Device(name, total_bytes, source, driver_bytes, _CONTEXT_BYTES, _CONTEXT_SOURCE, capability)


_MODAL = "modal-labs/modal-client#2797"

PRESETS: tuple[Device, ...] = (
    _nominal("GTX 1080 Ti 11GB", 11 * 1024 * MIB, (6, 1)),
    _nominal("RTX 2080 Ti 11GB", 11 * 1024 * MIB, (7, 5)),
    _seen_by_torch("RTX 3060 12GB", 11.75, (8, 6), "smy20011/dreambooth-gui#78"),
    _nominal("RTX 3080 10GB", 10 * 1024 * MIB, (8, 6)),
    _nominal("RTX 3090 24GB", 24 * 1024 * MIB, (8, 6)),
    _nominal("RTX 4060 Ti 16GB", 16 * 1024 * MIB, (8, 9)),
    _nominal("RTX 4070 12GB", 12 * 1024 * MIB, (8, 9)),
    _nominal("RTX 4080 16GB", 16 * 1024 * MIB, (8, 9)),
    _seen_by_torch("RTX 4090 24GB", 23.64, (8, 9), "ali-vilab/VGen#104"),
    _seen_by_torch("RTX 5090 32GB", 31.36, (12, 0), "TrajectoryCrafter/TrajectoryCrafter#20"),
    _nominal("RTX A6000 48GB", 48 * 1024 * MIB, (8, 6)),
    _seen_by_torch("RTX 6000 Ada 48GB", 44.43, (8, 9), "with ECC, DINGYANB/MTVCrafter#21"),
    _seen_by_torch("T4 16GB", 14.56, (7, 5), "Zheng-Chong/CatVTON#133"),
    _nominal("P100 16GB", 16 * 1024 * MIB, (6, 0)),
    _nominal("V100 16GB", 16 * 1024 * MIB, (7, 0)),
    _seen_by_torch("V100 32GB", 31.74, (7, 0), "liucongg/ChatGLM-Finetuning#73"),
    _seen_by_torch("A10 24GB", 21.99, (8, 6), "zai-org/CogVLM#236"),
    _shown_by_nvidia_smi("L4 24GB", 23_034, (8, 9), _MODAL),
    _seen_by_torch("L40 48GB", 44.40, (8, 9), "NVlabs/Eagle#68"),
    _shown_by_nvidia_smi("L40S 48GB", 46_068, (8, 9), _MODAL),
    _shown_by_nvidia_smi("A100 40GB", 40_960, (8, 0), _MODAL),
    _shown_by_nvidia_smi("A100 80GB", 81_920, (8, 0), _MODAL),
    _shown_by_nvidia_smi("H100 80GB", 81_559, (9, 0), _MODAL),
    _nominal("H200 141GB", 141 * 10**9, (9, 0)),
)
