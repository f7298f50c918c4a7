"""Train with few nonzero weights, and store only these: weights, gradients and optimizer state."""

from lightning_memtrain.sparsity.initial_pattern import random_positions
from lightning_memtrain.sparsity.methods.distributions import (
    Distribution,
    ErdosRenyi,
    ErdosRenyiKernel,
    Uniform,
)
from lightning_memtrain.sparsity.methods.dsr import DSR
from lightning_memtrain.sparsity.methods.gradual_magnitude_pruning import GradualMagnitudePruning
from lightning_memtrain.sparsity.methods.rigl import RigL
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerChange, LayerView, UpdateTime
from lightning_memtrain.sparsity.methods.set import SET
from lightning_memtrain.sparsity.methods.sparse_method import PatternUpdate, SparseMethod
from lightning_memtrain.sparsity.methods.static_sparse import StaticSparse
from lightning_memtrain.sparsity.methods.update_schedules import (
    RunLength,
    UpdateEvery,
    UpdatePiecewise,
    UpdateSchedule,
    UpdateSteps,
)
from lightning_memtrain.sparsity.methods.value_schedules import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    LinearSchedule,
    Schedule,
)
from lightning_memtrain.sparsity.pattern_updater import PatternUpdater
from lightning_memtrain.sparsity.selection.select import Select
from lightning_memtrain.sparsity.sparse_training import SparseTraining
from lightning_memtrain.sparsity.storage.candidate_search import Candidates
from lightning_memtrain.sparsity.storage.candidate_watch import CandidateWatch, watch_candidates
from lightning_memtrain.sparsity.storage.dense_export import dense_state_dict, export_dense
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight, sparse_weights
from lightning_memtrain.sparsity.storage.sparsify import densify_, sparsify_

__all__ = [
    "DSR",
    "SET",
    "CandidateWatch",
    "Candidates",
    "ConstantSchedule",
    "CosineSchedule",
    "CubicSchedule",
    "Distribution",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "GradualMagnitudePruning",
    "LayerChange",
    "LayerView",
    "LinearSchedule",
    "PatternUpdate",
    "PatternUpdater",
    "RigL",
    "RunLength",
    "Schedule",
    "Select",
    "SparseMethod",
    "SparseTraining",
    "SparseWeight",
    "StaticSparse",
    "Uniform",
    "UpdateEvery",
    "UpdatePiecewise",
    "UpdateSchedule",
    "UpdateSteps",
    "UpdateTime",
    "dense_state_dict",
    "densify_",
    "export_dense",
    "random_positions",
    "sparse_weights",
    "sparsify_",
    "watch_candidates",
]
