"""Train PyTorch Lightning models in a fraction of the memory, and see where every byte goes.

What is used most is here; the rest is in the subpackages, each named after its technique:
``lightning_memtrain.sparsity.RigL``, ``lightning_memtrain.checkpointing.Full``, ...
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

from lightning_memtrain.__about__ import __version__

if TYPE_CHECKING:
    from lightning_memtrain import (
        checkpointing as checkpointing,
    )
    from lightning_memtrain import (
        core as core,
    )
    from lightning_memtrain import (
        ledger as ledger,
    )
    from lightning_memtrain import (
        microbatching as microbatching,
    )
    from lightning_memtrain import (
        optimizer_in_backward as optimizer_in_backward,
    )
    from lightning_memtrain import (
        planning as planning,
    )
    from lightning_memtrain import (
        precision as precision,
    )
    from lightning_memtrain import (
        report as report,
    )
    from lightning_memtrain import (
        sparsity as sparsity,
    )
    from lightning_memtrain import (
        study as study,
    )
    from lightning_memtrain.checkpointing import ActivationCheckpointing, insert_checkpoints
    from lightning_memtrain.core import ArgumentError
    from lightning_memtrain.ledger import MemoryLedger
    from lightning_memtrain.microbatching import Microbatching, microbatched_backward
    from lightning_memtrain.optimizer_in_backward import OptimizerInBackward, step_in_backward
    from lightning_memtrain.planning import FitMemory, plan, predict
    from lightning_memtrain.precision import CompressedActivations, LowPrecision
    from lightning_memtrain.report import MemoryProfiler, MemoryReport
    from lightning_memtrain.sparsity import SparseTraining, sparsify_

__all__ = [
    "ActivationCheckpointing",
    "ArgumentError",
    "CompressedActivations",
    "FitMemory",
    "LowPrecision",
    "MemoryLedger",
    "MemoryProfiler",
    "MemoryReport",
    "Microbatching",
    "OptimizerInBackward",
    "SparseTraining",
    "__version__",
    "insert_checkpoints",
    "microbatched_backward",
    "plan",
    "predict",
    "sparsify_",
    "step_in_backward",
]

# Subpackages and names are imported at their first use, so that `memtrain --help` need not wait for torch.
_SUBPACKAGES = (
    "checkpointing",
    "core",
    "ledger",
    "microbatching",
    "optimizer_in_backward",
    "planning",
    "precision",
    "report",
    "sparsity",
    "study",
)
_HOMES = {
    "ActivationCheckpointing": "checkpointing",
    "ArgumentError": "core",
    "CompressedActivations": "precision",
    "FitMemory": "planning",
    "LowPrecision": "precision",
    "MemoryLedger": "ledger",
    "MemoryProfiler": "report",
    "MemoryReport": "report",
    "Microbatching": "microbatching",
    "OptimizerInBackward": "optimizer_in_backward",
    "SparseTraining": "sparsity",
    "insert_checkpoints": "checkpointing",
    "microbatched_backward": "microbatching",
    "plan": "planning",
    "predict": "planning",
    "sparsify_": "sparsity",
    "step_in_backward": "optimizer_in_backward",
}

# The wheel carries the recipes inside the package; a checkout has them beside it, where they are easier to
# read and copy. Extending the package's search path gives both the one name `lightning_memtrain.recipes`.
_checkout = _Path(__file__).resolve().parent.parent
if not (_checkout / "lightning_memtrain" / "recipes").exists() and (_checkout / "recipes").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return _import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")
    value = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    if name == "MemoryProfiler":
        # A report predicts nothing itself; here, above all subpackages, it is told who does.
        _import_module(f"{__name__}.report.suggestions").use(_suggest)
    return value


def _suggest(*args: _Any) -> tuple[str, ...]:
    from lightning_memtrain.planning.fit.suggest import suggest

    return suggest(*args)


def _hint(name: str) -> str:
    if name.startswith("_") or name.islower():  # asked of a module that is about to be imported, too
        return ""
    for subpackage in _SUBPACKAGES:
        if name in _import_module(f"{__name__}.{subpackage}").__all__:
            return f"; it is `{__name__}.{subpackage}.{name}`"
    return ""


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
