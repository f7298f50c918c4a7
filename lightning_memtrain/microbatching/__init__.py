"""Microbatching: any batch in the memory of a small one."""

from lightning_memtrain.microbatching.batchnorm.groupnorm import batchnorm_to_groupnorm
from lightning_memtrain.microbatching.early_zero_grad import EarlyZeroGrad
from lightning_memtrain.microbatching.microbatching_callback import Microbatching
from lightning_memtrain.microbatching.strategies import MemtrainDDPStrategy, MemtrainFSDPStrategy

__all__ = [
    "EarlyZeroGrad",
    "MemtrainDDPStrategy",
    "MemtrainFSDPStrategy",
    "Microbatching",
    "batchnorm_to_groupnorm",
]
