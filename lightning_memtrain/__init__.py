"""Train PyTorch Lightning models in a fraction of the memory, and see where every byte goes."""

from functools import partial as _partial
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from lightning_memtrain.__about__ import __version__
from lightning_memtrain._registration import when_imported as _when_imported

if TYPE_CHECKING:
    from lightning_memtrain.checkpointing import (
        ActivationCheckpointing,
        Budget,
        CheckpointPolicy,
        Every,
        Full,
        Modules,
        Nested,
        OffloadActivations,
        Recomputed,
        SelectiveOps,
        Sqrt,
        insert_checkpoints,
    )
    from lightning_memtrain.core import (
        Category,
        CategoryBytes,
        Growth,
        MemoryBreakdown,
        ModuleMemory,
        NoEffectWarning,
        ReportWarning,
        Technique,
        TechniqueRecord,
        TimelineEvent,
    )
    from lightning_memtrain.ledger import MemoryLedger, OpWorkspace, device_truth
    from lightning_memtrain.microbatching import (
        EarlyZeroGrad,
        MemtrainDDPStrategy,
        MemtrainFSDPStrategy,
        Microbatching,
        batchnorm_to_groupnorm,
    )
    from lightning_memtrain.optimizer_in_backward import (
        Accumulation,
        AdamA,
        ExactMomentum,
        OptimizerInBackward,
    )
    from lightning_memtrain.planning import predict
    from lightning_memtrain.precision import (
        ActivationCodec,
        CompressedActivations,
        LowPrecision,
        ScalerConfig,
        SGD8bit,
        adam8bit,
        adamw4bit,
        adamw8bit,
    )
    from lightning_memtrain.report import MemoryProfiler, MemoryReport
    from lightning_memtrain.sparsity import (
        DSR,
        SET,
        CosineSchedule,
        CubicSchedule,
        DynamicSparseReparameterization,
        ErdosRenyi,
        ErdosRenyiKernel,
        GradualMagnitudePruning,
        LinearSchedule,
        RigL,
        Select,
        SparseMethod,
        SparseTraining,
        StaticSparse,
        Uniform,
        UpdateEvery,
        UpdatePiecewise,
        dense_state_dict,
        densify_,
        export_dense,
        sparse_weights,
        sparsify_,
    )

# Names are looked up at their first use, so that `memtrain --help` need not wait for torch.
_ROOMS = {
    "Accumulation": "optimizer_in_backward",
    "ActivationCheckpointing": "checkpointing",
    "ActivationCodec": "precision",
    "AdamA": "optimizer_in_backward",
    "Budget": "checkpointing",
    "Category": "core",
    "CategoryBytes": "core",
    "CheckpointPolicy": "checkpointing",
    "CompressedActivations": "precision",
    "CosineSchedule": "sparsity",
    "CubicSchedule": "sparsity",
    "DSR": "sparsity",
    "DynamicSparseReparameterization": "sparsity",
    "EarlyZeroGrad": "microbatching",
    "ErdosRenyi": "sparsity",
    "ErdosRenyiKernel": "sparsity",
    "Every": "checkpointing",
    "ExactMomentum": "optimizer_in_backward",
    "Full": "checkpointing",
    "GradualMagnitudePruning": "sparsity",
    "Growth": "core",
    "LinearSchedule": "sparsity",
    "LowPrecision": "precision",
    "MemoryBreakdown": "core",
    "MemoryLedger": "ledger",
    "MemoryProfiler": "report",
    "MemoryReport": "report",
    "MemtrainDDPStrategy": "microbatching",
    "MemtrainFSDPStrategy": "microbatching",
    "Microbatching": "microbatching",
    "ModuleMemory": "core",
    "Modules": "checkpointing",
    "Nested": "checkpointing",
    "NoEffectWarning": "core",
    "OffloadActivations": "checkpointing",
    "OpWorkspace": "ledger",
    "OptimizerInBackward": "optimizer_in_backward",
    "Recomputed": "checkpointing",
    "ReportWarning": "core",
    "RigL": "sparsity",
    "SET": "sparsity",
    "SGD8bit": "precision",
    "ScalerConfig": "precision",
    "Select": "sparsity",
    "SelectiveOps": "checkpointing",
    "SparseMethod": "sparsity",
    "SparseTraining": "sparsity",
    "Sqrt": "checkpointing",
    "StaticSparse": "sparsity",
    "Technique": "core",
    "TechniqueRecord": "core",
    "TimelineEvent": "core",
    "Uniform": "sparsity",
    "UpdateEvery": "sparsity",
    "UpdatePiecewise": "sparsity",
    "adam8bit": "precision",
    "adamw4bit": "precision",
    "adamw8bit": "precision",
    "batchnorm_to_groupnorm": "microbatching",
    "device_truth": "ledger",
    "dense_state_dict": "sparsity",
    "densify_": "sparsity",
    "export_dense": "sparsity",
    "insert_checkpoints": "checkpointing",
    "predict": "planning",
    "sparse_weights": "sparsity",
    "sparsify_": "sparsity",
}

__all__ = [
    "DSR",
    "SET",
    "Accumulation",
    "ActivationCheckpointing",
    "ActivationCodec",
    "AdamA",
    "Budget",
    "Category",
    "CategoryBytes",
    "CheckpointPolicy",
    "CompressedActivations",
    "CosineSchedule",
    "CubicSchedule",
    "DynamicSparseReparameterization",
    "EarlyZeroGrad",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "Every",
    "ExactMomentum",
    "Full",
    "GradualMagnitudePruning",
    "Growth",
    "LinearSchedule",
    "LowPrecision",
    "MemoryBreakdown",
    "MemoryLedger",
    "MemoryProfiler",
    "MemoryReport",
    "MemtrainDDPStrategy",
    "MemtrainFSDPStrategy",
    "Microbatching",
    "ModuleMemory",
    "Modules",
    "Nested",
    "NoEffectWarning",
    "OffloadActivations",
    "OpWorkspace",
    "OptimizerInBackward",
    "Recomputed",
    "ReportWarning",
    "RigL",
    "SGD8bit",
    "ScalerConfig",
    "Select",
    "SelectiveOps",
    "SparseMethod",
    "SparseTraining",
    "Sqrt",
    "StaticSparse",
    "Technique",
    "TechniqueRecord",
    "TimelineEvent",
    "Uniform",
    "UpdateEvery",
    "UpdatePiecewise",
    "__version__",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "batchnorm_to_groupnorm",
    "dense_state_dict",
    "densify_",
    "device_truth",
    "export_dense",
    "insert_checkpoints",
    "predict",
    "sparse_weights",
    "sparsify_",
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


# Strategies that are chosen by name have to be known before a Trainer looks for them.
_STRATEGIES = {"memtrain_ddp": "MemtrainDDPStrategy", "memtrain_fsdp": "MemtrainFSDPStrategy"}


def _make_strategy(name: str, **options: object) -> object:
    kind = getattr(_import_module(f"{__name__}.{_ROOMS[_STRATEGIES[name]]}"), _STRATEGIES[name])
    return kind(**options)


def _register_strategies(package: str) -> None:
    registry = _import_module(f"{package}.strategies").StrategyRegistry
    for name in _STRATEGIES:
        if name not in registry:
            registry.register(name, _partial(_make_strategy, name), "with Microbatching")


for _package in ("lightning.pytorch", "pytorch_lightning"):
    _when_imported(_package, _partial(_register_strategies, _package))
