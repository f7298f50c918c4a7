"""The one door to what torch, Lightning and torchmetrics do not promise to keep."""

from typing import TYPE_CHECKING

from lightning_memtrain.compat.first_use import at_first_use

if TYPE_CHECKING:
    from lightning_memtrain.compat.training_step import wrap_training_step
else:
    __getattr__ = at_first_use(__name__, {"wrap_training_step": "training_step"})

__all__ = ["wrap_training_step"]
