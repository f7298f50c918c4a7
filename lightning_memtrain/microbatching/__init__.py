"""Microbatching: any batch in the memory of a small one."""

from lightning_memtrain.microbatching.microbatching_callback import Microbatching
from lightning_memtrain.microbatching.normalization.centered_weights import center_weights_
from lightning_memtrain.microbatching.normalization.centered_weights_callback import CenteredWeights
from lightning_memtrain.microbatching.normalization.replace_batchnorm import replace_batchnorm
from lightning_memtrain.microbatching.normalization.sample_norms import GroupNorm, SampleNorm
from lightning_memtrain.microbatching.plain_loop import microbatched_backward

__all__ = [
    "CenteredWeights",
    "GroupNorm",
    "Microbatching",
    "SampleNorm",
    "center_weights_",
    "microbatched_backward",
    "replace_batchnorm",
]
