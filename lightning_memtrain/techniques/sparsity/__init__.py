"""Train with few nonzero weights, and store only these: weights, gradients and optimizer state."""

from lightning_memtrain.techniques.sparsity.candidates import Candidates, CandidateWatch, watch_candidates
from lightning_memtrain.techniques.sparsity.export import export_dense
from lightning_memtrain.techniques.sparsity.patterns import Storage
from lightning_memtrain.techniques.sparsity.weights import SparseWeight, sparse_weights, sparsify_

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
