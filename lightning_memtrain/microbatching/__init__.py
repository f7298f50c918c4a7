"""Microbatching: any batch in the memory of a small one."""

from lightning_memtrain.microbatching.batchnorm.groupnorm import batchnorm_to_groupnorm
from lightning_memtrain.microbatching.microbatching_callback import Microbatching
from lightning_memtrain.microbatching.plain_loop import microbatched_backward

__all__ = ["Microbatching", "batchnorm_to_groupnorm", "microbatched_backward"]
