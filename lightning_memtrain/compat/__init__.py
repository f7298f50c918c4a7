"""The one door to what torch, Lightning and torchmetrics do not promise to keep."""

from lightning_memtrain.compat.training_step import wrap_training_step

__all__ = ["wrap_training_step"]
