"""The one door to what torch, Lightning and torchmetrics do not promise to keep."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_memtrain.compat.training_step import wrap_training_step

__all__ = ["wrap_training_step"]

if not TYPE_CHECKING:

    def __getattr__(name):
        # At its first use, since it imports torch, which what only reads files must not wait for.
        if name != "wrap_training_step":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from lightning_memtrain.compat.training_step import wrap_training_step

        return wrap_training_step
