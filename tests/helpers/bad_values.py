"""Everything public that takes arguments, with good ones, and with bad ones to put in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

import lightning_memtrain as mt

NAN, INFINITY = float("nan"), float("inf")
TEXT = "3"
UNKNOWN = "nonsense"

COUNT = (0, -1, 2.5, 1.0, True, TEXT, None)
OPTIONAL_COUNT = COUNT[:-1]
WHOLE_FROM_0 = (-1, 2.5, 1.0, True, TEXT, None)
WHOLE = (2.5, 1.0, True, TEXT, None)
# Where a size is a limit of a run, a float between 0 and 1 is right; nowhere else.
OPTIONAL_LIMIT = (
    True,
    False,
    0,
    -1,
    1.0,
    0.0,
    2.5,
    -0.5,
    NAN,
    INFINITY,
    "4G",
    "4",
    "0.9",
    "90%",
    "",
    [],
    b"4GiB",
)
OPTIONAL_SIZE = (*OPTIONAL_LIMIT, 0.9)
SIZE = (*OPTIONAL_SIZE, None)
FLAG = (0, 1, "yes", None)
CHOICE = (UNKNOWN, 3, "", [], True, None)
NUMBER = (NAN, INFINITY, True, TEXT, None, [])
POSITIVE = (*NUMBER, 0, -1.0)
NOT_NEGATIVE = (*NUMBER, -1.0)
SPARSITY = (1.0, -0.1, 90, NAN, True, "0.9", None, {}, {"0": 1.5}, {0: 0.5})
SHARE = (1.0, -0.1, 2, NAN, True, "0.3", None)
OBJECT = (3, UNKNOWN, True, object)
FUNCTION = (3, UNKNOWN)
MODULES = ("0", 3, None, True, [3], [None], [int], [""])

MODEL = (3, UNKNOWN, None, nn.Linear)


def network() -> nn.Module:
    """A small one.

    Returns:
        Two layers.
    """
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def sgd() -> torch.optim.Optimizer:
    """An optimizer of a small network.

    Returns:
        The optimizer.
    """
    return torch.optim.SGD(network().parameters(), lr=0.1)


def sparse() -> dict[str, Any]:
    """A sparse weight.

    Returns:
        By name.
    """
    return mt.sparsify_(network(), {"0.weight": torch.arange(8)})


@dataclass(frozen=True)
class Case:
    """Something public: how it is called, and what each of its arguments must not be.

    Args:
        bad: values that must be refused, by argument.
        good: what else has to be passed; called before each call.
        free: arguments of which any value is right, or which only the library passes.
    """

    bad: Mapping[str, tuple[Any, ...]]
    good: Callable[[], dict[str, Any]] = dict
    free: tuple[str, ...] = ()


_DISTRIBUTION = (*OBJECT, None)
_SPARSE_METHOD = {"sparsity": SPARSITY, "distribution": _DISTRIBUTION}
_SCHEDULE = {"begin": NUMBER, "end": NUMBER}
_SPLIT = {
    "num_microbatches": OPTIONAL_COUNT,
    "loss_reduction": CHOICE,
    "weight_fn": FUNCTION,
    "split_fn": FUNCTION,
    "batchnorm": CHOICE,
    "num_batchnorm_sweeps": COUNT,
}
_ADAM = {
    "lr": NOT_NEGATIVE,
    "betas": (3, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", "b"), None),
    "eps": NOT_NEGATIVE,
}
_PARAMS = (3, None, UNKNOWN, [])
_OPTIONAL_POSITIVE = tuple(value for value in POSITIVE if value is not None)
_OPTIONAL_MODULES = tuple(value for value in MODULES if value is not None)


def _loss() -> dict[str, Any]:
    return {
        "model": network(),
        "loss_fn": lambda rows: rows.sum(),
        "batch": torch.ones(4, 8),
        "num_microbatches": 2,
    }


CASES: dict[str, Case] = {
    "MemoryProfiler": Case(
        {
            "every_n_steps": COUNT,
            "per_module": FLAG,
            "timeline": FLAG,
            "report_dir": (3, True, []),
            "max_rows": (0, 1, -1, 2.5, True, TEXT),
            "predict": FUNCTION,
            "log_all": FLAG,
            "stacks": FLAG,
        }
    ),
    "MemoryLedger": Case(
        {
            "model": MODEL,
            "optimizers": (3, UNKNOWN, [3], None),
            "device": (3.5, UNKNOWN, []),
            "workspace": OBJECT,
            "limit": OBJECT,
            "held": (3, UNKNOWN, [3]),
        },
        lambda: {"model": network()},
        free=("inputs",),
    ),
    "Microbatching": Case(
        {
            **_SPLIT,
            "microbatch_size": (0, -1, 2.5, True, TEXT, UNKNOWN),
            "limit": OPTIONAL_LIMIT,
            "grow_after_batches": COUNT,
            "sync_each_chunk": FLAG,
            "recover": FLAG,
        },
        lambda: {"num_microbatches": 2},
    ),
    "microbatched_backward": Case(
        {
            **_SPLIT,
            "microbatch_size": (0, -1, 2.5, True, TEXT, "auto"),
            "model": MODEL,
            "loss_fn": (*FUNCTION, None),
            "backward": (*FUNCTION, None),
        },
        _loss,
        free=("batch",),
    ),
    "ActivationCheckpointing": Case(
        {"policy": (0, -1, 0.0, 1.0, 2.5, NAN, INFINITY, True, None, UNKNOWN, "4G", [], [3], object())}
    ),
    "insert_checkpoints": Case(
        {
            "model": MODEL,
            "groups": (3, UNKNOWN, None, [3], [["0"]], [[mt.checkpointing.Recomputed("9")]]),
            "contexts": FUNCTION,
        },
        lambda: {"model": network(), "groups": [[mt.checkpointing.Recomputed("0")]]},
    ),
    "LowPrecision": Case(
        {
            "precision": CHOICE,
            "weight_rounding": CHOICE,
            "keep_in_fp32": MODULES,
            "scaler": OBJECT,
            "activations": OBJECT,
            "cast_targets": FLAG,
            "seed": WHOLE,
            "bucket_numel": OPTIONAL_COUNT,
            "leave": CHOICE,
        }
    ),
    "CompressedActivations": Case({"codec": OBJECT}),
    "OptimizerInBackward": Case(
        {"accumulation": OBJECT, "clip_by_norm": CHOICE[:-1], "hooks_without_gradients": FLAG}
    ),
    "step_in_backward": Case(
        {
            "optimizer": (*OBJECT, None),
            "accumulation": OBJECT,
            "clip_value": (0, -1.0, NAN, True, TEXT),
            "step_parameter": (*FUNCTION, None),
        },
        lambda: {"optimizer": sgd()},
    ),
    "SparseTraining": Case(
        {
            "method": (*OBJECT, 0.9, None),
            "update": (*OBJECT, 100),
            "layers": OBJECT,
            "storage": CHOICE,
            "chunk_bytes": OPTIONAL_SIZE,
            "seed": WHOLE,
            "track_exploration": FLAG,
            "leave": CHOICE,
        },
        lambda: {"method": mt.sparsity.RigL(0.9)},
    ),
    "sparsify_": Case(
        {
            "module": MODEL,
            "positions": (
                3,
                UNKNOWN,
                None,
                {"9.weight": torch.arange(2)},
                {"0.weight": [0, 1]},
                {0: torch.arange(2)},
            ),
            "storage": CHOICE,
            "chunk_bytes": OPTIONAL_SIZE,
        },
        lambda: {"module": network(), "positions": {"0.weight": torch.arange(2)}},
    ),
    "predict": Case(
        {
            "model": (3, UNKNOWN, None, network()),
            "datamodule": OBJECT,
            "trainer": OBJECT,
            "device": (3, True, "RTX 9999", []),
            "world_size": OPTIONAL_COUNT,
            "strategy": (3, UNKNOWN, "fsdp", True),
        },
        lambda: {
            "model": BoringModel(),
            "device": "RTX 4090",
        },
        free=("batch",),
    ),
    "core.CategoryBytes": Case({"bytes_by_category": ({UNKNOWN: 3}, 3)}),
    "core.TechniqueRecord": Case(
        {
            "name": ("", 3, None),
            "settings": ({"a": NAN}, {"a": []}, {3: 1}, 3),
            "events": ([3], (3,), "a", None),
        },
        lambda: {"name": "A"},
    ),
    "ledger.OpWorkspace": Case({"device": (3.5, UNKNOWN, None, "meta")}),
    "ledger.allocator_statistics": Case({"device": (3.5, UNKNOWN, None)}),
    "checkpointing.MemoryBudget": Case({"limit": OPTIONAL_LIMIT}),
    "checkpointing.Every": Case({"k": COUNT}),
    "checkpointing.Nested": Case({"num_parts": (1, *COUNT)}),
    "checkpointing.Modules": Case({"names_or_types": (*MODULES, [])}),
    "checkpointing.SelectiveOps": Case({"ops": (3, UNKNOWN, None, [UNKNOWN], ["aten.nonsense"], [3])}),
    "checkpointing.Recomputed": Case(
        {"name": (3, None, True), "path": (3, UNKNOWN, None, (0.5,), ("a",), (True,))}, lambda: {"name": "0"}
    ),
    "checkpointing.plan_recomputation": Case(
        {
            "model": MODEL,
            "step": (*FUNCTION, None),
            "arguments": (3, None),
            "optimizers": (3, UNKNOWN, [3], None),
            "limit": OPTIONAL_LIMIT,
        },
        lambda: {"model": network(), "step": lambda rows: rows.sum(), "arguments": [torch.ones(2, 8)]},
    ),
    "checkpointing.experimental.OffloadActivations": Case({"min_bytes": SIZE}),
    "checkpointing.experimental.offloaded_activations": Case({"min_bytes": SIZE}),
    "microbatching.CenteredWeights": Case({"layers": _OPTIONAL_MODULES, "length": _OPTIONAL_POSITIVE}),
    "microbatching.GroupNorm": Case({"num_groups": OPTIONAL_COUNT, "channels_per_group": OPTIONAL_COUNT}),
    "microbatching.center_weights_": Case(
        {"model": MODEL, "layers": _OPTIONAL_MODULES, "length": _OPTIONAL_POSITIVE},
        lambda: {"model": nn.Sequential(nn.Conv2d(8, 8, 1))},
    ),
    "microbatching.replace_batchnorm": Case(
        {"model": MODEL, "norm": (*OBJECT, None)},
        lambda: {"model": nn.Sequential(nn.BatchNorm1d(4)), "norm": mt.microbatching.GroupNorm()},
    ),
    "precision.ActivationCodec": Case(
        {
            "bits": (0, 3, 16, 8.0, True, "8", None),
            "group_size": (0, -8, 12, 64.0, True, "64"),
            "min_numel": COUNT,
            "stochastic": FLAG,
            "seed": (-1, 2**32, *WHOLE),
            "compiled": FLAG[:-1],
        }
    ),
    "precision.ScalerConfig": Case(
        {"init_scale": POSITIVE, "growth_interval": COUNT, "max_scale": (0, -1.0, NAN, True, TEXT)}
    ),
    "precision.SGD8bit": Case(
        {
            "params": _PARAMS,
            "lr": NOT_NEGATIVE,
            "momentum": (*NOT_NEGATIVE, 1.0),
            "dampening": NUMBER,
            "weight_decay": NOT_NEGATIVE,
            "nesterov": FLAG,
            "maximize": FLAG,
        },
        lambda: {"params": list(network().parameters())},
    ),
    "precision.adam8bit": Case(
        {"params": _PARAMS, **_ADAM}, lambda: {"params": list(network().parameters())}
    ),
    "precision.adamw8bit": Case(
        {"params": _PARAMS, **_ADAM, "weight_decay": NOT_NEGATIVE},
        lambda: {"params": list(network().parameters())},
    ),
    "precision.adamw4bit": Case(
        {"params": _PARAMS, **_ADAM, "weight_decay": NOT_NEGATIVE},
        lambda: {"params": list(network().parameters())},
    ),
    "precision.convert_to_low_precision_": Case(
        {
            "module": MODEL,
            "dtype": (torch.float32, torch.int8, "bf16", 16, None),
            "keep_in_fp32": (*MODULES, ["9"], ["Conv2d"]),
        },
        lambda: {"module": network()},
    ),
    "precision.restore_float32_": Case({"module": MODEL}),
    "precision.cast_batch": Case(
        {"dtype": (torch.int8, "bf16", None), "cast_targets": FLAG},
        lambda: {"batch": torch.ones(2), "dtype": torch.bfloat16},
        free=("batch",),
    ),
    "precision.stochastic_round": Case(
        {
            "values": (3, None, torch.ones(2, dtype=torch.bfloat16)),
            "dtype": (torch.float32, "bf16", None),
            "generator": (3, None),
        },
        lambda: {"values": torch.ones(2), "dtype": torch.bfloat16, "generator": torch.Generator()},
    ),
    "precision.BucketedStep": Case(
        {"optimizer": (*OBJECT, None), "noise": OBJECT, "bucket_numel": OPTIONAL_COUNT},
        lambda: {"optimizer": sgd()},
    ),
    "precision.RoundingNoise": Case({"seed": WHOLE}),
    "precision.HalfGradScaler": Case(
        {"device": (3.5, UNKNOWN, None), "config": (*OBJECT, None)},
        lambda: {"device": "cpu", "config": mt.precision.ScalerConfig()},
    ),
    "sparsity.Select": Case(
        {
            "types": (*MODULES, []),
            "dense": MODULES,
            "overrides": (3, UNKNOWN, None, {"0": 1.5}, {"0": True}, {0: 0.5}),
            "dense_ends": FLAG,
        }
    ),
    "sparsity.StaticSparse": Case(_SPARSE_METHOD, lambda: {"sparsity": 0.9}),
    "sparsity.SET": Case({**_SPARSE_METHOD, "drop": SHARE}, lambda: {"sparsity": 0.9}),
    "sparsity.RigL": Case({**_SPARSE_METHOD, "drop": SHARE}, lambda: {"sparsity": 0.9}),
    "sparsity.DSR": Case(
        {
            **_SPARSE_METHOD,
            "reallocate": (0, -1, 1.0, 1.5, NAN, True, TEXT, None),
            "threshold": POSITIVE,
            "tolerance": SHARE,
        },
        lambda: {"sparsity": 0.9},
    ),
    "sparsity.GradualMagnitudePruning": Case(
        {"sparsity": (1.0, -0.1, 90, NAN, True, "0.9", None), "scope": CHOICE, "distribution": _DISTRIBUTION},
        lambda: {"sparsity": 0.9},
    ),
    "sparsity.ConstantSchedule": Case({"rate": NUMBER}),
    "sparsity.CosineSchedule": Case(_SCHEDULE, lambda: {"begin": 0.3}),
    "sparsity.LinearSchedule": Case(_SCHEDULE, lambda: {"begin": 0.3}),
    "sparsity.CubicSchedule": Case(_SCHEDULE, lambda: {"begin": 0.3}),
    "sparsity.UpdateEvery": Case(
        {
            "steps": COUNT,
            "start": (-1, 1.0, 1.5, NAN, True, TEXT, None),
            "stop": (0, 1, 1.5, -1, NAN, True, TEXT, None),
        }
    ),
    "sparsity.UpdatePiecewise": Case(
        {
            "periods": (3, {}, None, {0: 0}, {-1: 100}, {0: 2.5}, {0: True}, {True: 100}, {0.5: 100}),
            "unit": CHOICE,
            "stop": (1.0, 1.5, -1, NAN, True, TEXT),
        },
        lambda: {"periods": {0: 100}},
    ),
    "sparsity.densify_": Case(
        {"module": MODEL, "optimizers": (3, UNKNOWN, [3], None)}, lambda: {"module": network()}
    ),
    "sparsity.sparse_weights": Case({"module": MODEL}),
    "sparsity.export_dense": Case({"module": MODEL}),
    "sparsity.dense_state_dict": Case(
        {"state_dict": (3, None, UNKNOWN), "module": MODEL}, lambda: {"state_dict": {}, "module": network()}
    ),
    "sparsity.random_positions": Case(
        {"model": MODEL, "method": (*OBJECT, None), "select": OBJECT, "seed": WHOLE},
        lambda: {"model": network(), "method": mt.sparsity.StaticSparse(0.9)},
    ),
    "sparsity.PatternUpdater": Case(
        {"weights": (3, None, {"a": 3}), "method": (*OBJECT, None), "num_ranks": COUNT},
        lambda: {"weights": sparse(), "method": mt.sparsity.RigL(0.5)},
    ),
    "sparsity.RunLength": Case({"total_steps": WHOLE_FROM_0[:-1], "steps_per_epoch": WHOLE_FROM_0[:-1]}),
    "sparsity.UpdateTime": Case(
        {"step": WHOLE_FROM_0, "elapsed": WHOLE, "total": WHOLE_FROM_0, "seed": WHOLE},
        lambda: {"step": 1, "elapsed": 1, "total": 2},
    ),
    "sparsity.watch_candidates": Case(
        {
            "weights": (3, None, {"a": 3}),
            "num_candidates": (3, None, {"9": 3}, {"0.weight": 0}, {"0.weight": 2.5}),
        },
        lambda: {"weights": sparse(), "num_candidates": {"0.weight": 2}},
    ),
    "FitMemory": Case(
        {"limit": OPTIONAL_LIMIT, "allow": (3, UNKNOWN, True, [3]), "plan": (3, True, [])},
    ),
    "plan": Case(
        {
            "model": (3, UNKNOWN, None, network()),
            "limit": OPTIONAL_LIMIT,
            "device": (3, True, "RTX 9999", []),
            "allow": (3, UNKNOWN, True, [3]),
            "trainer": OBJECT,
            "techniques": (3, UNKNOWN, None, [3], [[]]),
        },
        lambda: {"model": BoringModel(), "limit": "1GiB", "device": "RTX 4090"},
        free=("data",),
    ),
    "checkpointing.Segments": Case({"segments": (3, UNKNOWN, None, ["0"], [[]], [[3]], True)}),
    "study.pareto_front": Case({"costs": (3, UNKNOWN, None, {"a": (1,), "b": (1, 2)})}),
    "study.load_run": Case({"path": (3, None, True, "/no/such/run")}),
    "study.compare_runs": Case({"loaded": (3, None, UNKNOWN, [], [3, 4])}, free=("stage",)),
    "planning.Device": Case(
        {
            "name": (3, None, ""),
            "total_bytes": SIZE,
            "driver_bytes": (True, -1, 2.5, "4G", None),
            "context_bytes": (True, -1, 2.5, "4G", None),
            "compute_capability": (8, 8.9, "8.9", (8,), (8, 9.5)),
        },
        lambda: {"name": "mine", "total_bytes": 2**30},
        free=("source", "context_source"),
    ),
}

# Results and records: the library makes them, users read them.
MADE_BY_THE_LIBRARY = {
    *("planning.Plan", "planning.Way", "planning.TechniqueSettings", "study.Comparison", "study.ComparedRun"),
    *("study.ChangedModule", "study.LoadedRun", "study.RunRecord", "study.StudyResult", "study.StudyRun"),
    "study.VariantResult",
    *("MemoryReport", "core.MemoryBreakdown", "core.ModuleMemory", "core.TimelineEvent", "core.Growth"),
    *("ledger.AllocatorStatistics", "ledger.AllocatorReading", "checkpointing.RecomputationPlan"),
    *(
        "precision.ConvertedBuffers",
        "precision.NamedBuffer",
        "precision.ActivationPacking",
        "precision.PackedBytes",
    ),
    *("optimizer_in_backward.BackwardSteps", "sparsity.SparseWeight", "sparsity.CandidateWatch"),
    *("sparsity.Candidates", "sparsity.LayerView", "sparsity.LayerChange", "sparsity.PatternUpdate"),
    *("sparsity.UpdateSteps", "planning.Prediction"),
}
# Base classes, enumerations, warnings, and what takes no argument.
WITHOUT_ARGUMENTS = {
    *("ArgumentError", "core.Category", "core.NoEffectWarning", "core.ReportWarning", "core.Technique"),
    *("checkpointing.Full", "checkpointing.Sqrt", "checkpointing.RecomputationPolicy"),
    "microbatching.SampleNorm",
    *(
        "optimizer_in_backward.ExactMomentum",
        "optimizer_in_backward.AdamA",
        "optimizer_in_backward.Accumulation",
    ),
    *("sparsity.SparseMethod", "sparsity.Uniform", "sparsity.ErdosRenyi", "sparsity.ErdosRenyiKernel"),
    *("sparsity.Schedule", "sparsity.Distribution", "sparsity.UpdateSchedule", "planning.Switch"),
}
