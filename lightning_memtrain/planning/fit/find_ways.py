"""Where ways are found: the one door to the search, for plans and for runs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_memtrain.compat.lightning_packages import in_both
from lightning_memtrain.planning.fit.search import search
from lightning_memtrain.planning.fit.way import FoundWays


def find_ways(model: Any, batch: Any = None, *, datamodule: Any = None, **options: Any) -> FoundWays:
    """Find what keeps a limit, see :class:`.Search`.

    Args:
        model: what is trained.
        batch: one batch, if there is one.
        datamodule: where batches come from; a loader will do.
        **options: further arguments of :class:`.Search`.

    Returns:
        The ways.
    """
    if datamodule is not None and not isinstance(datamodule, in_both(pl.LightningDataModule)):
        datamodule = LoaderModule(datamodule)
    return search(model, batch, datamodule=datamodule, **options)


class LoaderModule(pl.LightningDataModule):
    """A loader, as a data module.

    Args:
        loader: what yields batches.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self._loader = loader

    def train_dataloader(self) -> Any:
        """The loader itself."""
        return self._loader
