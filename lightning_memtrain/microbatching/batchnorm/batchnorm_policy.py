"""What batch normalisation does about chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_memtrain.microbatching.batchnorm.pooled_batchnorm import PooledBatchNorm
from lightning_memtrain.microbatching.batchnorm.synchronized_batchnorm import SynchronizedBatchNorm

BatchNormMode = Literal["pooled", "synchronized", "chunk"]


class BatchNormPolicy:
    """Applies one of the modes to the batches of a run.

    Args:
        model: the module that is trained.
        mode: see :class:`Microbatching`.
        num_sweeps: how often ``"synchronized"`` runs all chunks.
    """

    def __init__(self, model: nn.Module, mode: BatchNormMode, num_sweeps: int = 2) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._pooled = PooledBatchNorm(model) if mode == "pooled" else None
        self._synchronized = SynchronizedBatchNorm(model) if mode == "synchronized" else None
        self._active = False
        self.num_sweeps = num_sweeps

    @property
    def has_layers(self) -> bool:
        """Whether the model has batch normalisation at all."""
        return bool(self._layers)

    @property
    def may_synchronize(self) -> bool:
        """Whether some batches need that."""
        return self._synchronized is not None

    @property
    def synchronizes(self) -> bool:
        """Whether the batch at hand needs a pass over all of it, and sweeps."""
        return self._active and self._synchronized is not None

    @property
    def running_statistics(self) -> list[Tensor]:
        """Buffers of all layers."""
        return [buffer for layer in self._layers for buffer in layer.buffers(recurse=False)]

    @contextmanager
    def batch(self, num_chunks: int) -> Iterator[None]:
        """Around all chunks of a batch; without :meth:`finish`, running statistics stay as they were."""
        self._active = self.has_layers and num_chunks > 1
        around: AbstractContextManager[None] = nullcontext()
        if self._active and self._pooled is not None:
            around = self._pooled.collecting(num_chunks)
        elif self._active and self._synchronized is not None:
            around = self._synchronized.batch()
        with around:
            yield

    def statistics_pass(self) -> AbstractContextManager[None]:
        """Around the forward of the whole batch, if the batch :attr:`synchronizes`."""
        assert self._synchronized is not None
        return self._synchronized.statistics_pass()

    def sweep(self) -> AbstractContextManager[None]:
        """Around one run of all chunks, if the batch :attr:`synchronizes`."""
        assert self._synchronized is not None
        return self._synchronized.sweep()

    def chunk(self) -> AbstractContextManager[None]:
        """Around forward and backward of one chunk."""
        if self._active and self._pooled is not None:
            return self._pooled.chunk()
        if self._active and self._synchronized is not None:
            return self._synchronized.chunk()
        return nullcontext()

    def finish(self) -> None:
        """Once all chunks have run."""
        if self._active and self._pooled is not None:
            self._pooled.blend()
