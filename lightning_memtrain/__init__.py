"""Train PyTorch Lightning models in a fraction of the memory, and see where every byte goes."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from lightning_memtrain.__about__ import __version__

if TYPE_CHECKING:
    from lightning_memtrain.core import (
        Category,
        CategoryBytes,
        Growth,
        MemoryBreakdown,
        ModuleMemory,
        NoEffectWarning,
        ReportWarning,
        TimelineEvent,
    )
    from lightning_memtrain.ledger import MemoryLedger, OpWorkspace, device_truth
    from lightning_memtrain.report import MemoryProfiler, MemoryReport

# Names are looked up at their first use, so that `memtrain --help` need not wait for torch.
_ROOMS = {
    "Category": "core",
    "CategoryBytes": "core",
    "Growth": "core",
    "MemoryBreakdown": "core",
    "MemoryLedger": "ledger",
    "MemoryProfiler": "report",
    "MemoryReport": "report",
    "ModuleMemory": "core",
    "NoEffectWarning": "core",
    "OpWorkspace": "ledger",
    "ReportWarning": "core",
    "TimelineEvent": "core",
    "device_truth": "ledger",
}

__all__ = [
    "Category",
    "CategoryBytes",
    "Growth",
    "MemoryBreakdown",
    "MemoryLedger",
    "MemoryProfiler",
    "MemoryReport",
    "ModuleMemory",
    "NoEffectWarning",
    "OpWorkspace",
    "ReportWarning",
    "TimelineEvent",
    "__version__",
    "device_truth",
]

# The wheel carries the recipes inside the package; a checkout has them beside it, where they are easier to
# read and copy. Extending the package's search path gives both the one name `lightning_memtrain.recipes`.
_checkout = _Path(__file__).resolve().parent.parent
if not (_checkout / "lightning_memtrain" / "recipes").exists() and (_checkout / "recipes").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
