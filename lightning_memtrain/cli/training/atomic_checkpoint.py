"""Writes a checkpoint beside its place, and puts it there when it is whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's, but a file is there as a whole or not at all, whatever happens meanwhile.

    Lightning makes it in memory, writes it into the system's folder for temporary files and moves it from
    there. Where that is on another file system, as where it is in memory, a move is a copy, which a full disk
    or a killed process breaks off. Here it is written where it is to be, without a copy in memory.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint beside its place and put it there when it is whole.

        Args:
            checkpoint: what to write.
            path: the file; an older one is replaced in one move, or left as it was.
            storage_options: none are known.

        Raises:
            TypeError: if there are any.
            OSError: if there is no room, or another reason not to write; no torn file is left.
        """
        if storage_options is not None or "://" in str(path):  # refused there, or not a file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except RuntimeError as error:
            # On a full disk torch says that the position is not the one that it expects.
            if isinstance(error.__context__, OSError):
                error.__context__.filename = str(path)
                raise error.__context__ from None
            raise
        finally:
            part.unlink(missing_ok=True)


def use_atomic_checkpoints(trainer: pl.Trainer) -> None:
    """Have a trainer write whole checkpoints, if it would write single files as Lightning does.

    Args:
        trainer: its strategy may have a way of its own.
    """
    if type(getattr(trainer.strategy, "checkpoint_io", None)) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
