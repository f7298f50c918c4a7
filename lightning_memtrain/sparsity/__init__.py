"""Train with few nonzero weights, and store only these: weights, gradients and optimizer state."""

from lightning_memtrain.sparsity.callback import SparseTraining
from lightning_memtrain.sparsity.candidates import Candidates, CandidateWatch, watch_candidates
from lightning_memtrain.sparsity.clocks import UpdateClock, UpdateEvery, UpdatePiecewise
from lightning_memtrain.sparsity.distributions import Distribution, ErdosRenyi, ErdosRenyiKernel, Uniform
from lightning_memtrain.sparsity.export import dense_state_dict, export_dense
from lightning_memtrain.sparsity.methods import SET, RigL, SparseMethod, StaticSparse
from lightning_memtrain.sparsity.patterns import Storage
from lightning_memtrain.sparsity.pruning import GradualMagnitudePruning
from lightning_memtrain.sparsity.reparameterization import DSR, DynamicSparseReparameterization
from lightning_memtrain.sparsity.schedules import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    LinearSchedule,
    Schedule,
)
from lightning_memtrain.sparsity.selection import Select
from lightning_memtrain.sparsity.sparsify import densify_, sparsify_
from lightning_memtrain.sparsity.weights import SparseWeight, sparse_weights

__all__ = [
    "DSR",
    "SET",
    "CandidateWatch",
    "Candidates",
    "ConstantSchedule",
    "CosineSchedule",
    "CubicSchedule",
    "Distribution",
    "DynamicSparseReparameterization",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "GradualMagnitudePruning",
    "LinearSchedule",
    "RigL",
    "Schedule",
    "Select",
    "SparseMethod",
    "SparseTraining",
    "SparseWeight",
    "StaticSparse",
    "Storage",
    "Uniform",
    "UpdateClock",
    "UpdateEvery",
    "UpdatePiecewise",
    "dense_state_dict",
    "densify_",
    "export_dense",
    "sparse_weights",
    "sparsify_",
    "watch_candidates",
]
