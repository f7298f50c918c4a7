"""Sparse training whose weights, gradients and optimizer state take the memory of what is not zero."""

from lightning_memtrain.techniques.sparsity.weights import (
    Candidates,
    CandidateWatch,
    SparseWeight,
    Storage,
    export_dense,
    sparse_weights,
    sparsify_,
    watch_candidates,
)

__all__ = [
    "CandidateWatch",
    "Candidates",
    "SparseWeight",
    "Storage",
    "export_dense",
    "sparse_weights",
    "sparsify_",
    "watch_candidates",
]
