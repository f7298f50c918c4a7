"""What batch normalisation does about chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import BatchNorm
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.microbatching.batchnorm.pooled_batchnorm import PooledBatchNorm
from lightning_memtrain.microbatching.batchnorm.synchronized_batchnorm import SynchronizedBatchNorm
from lightning_memtrain.microbatching.splitting.argument_checks import check_choice, check_count

_T = TypeVar("_T")
BatchNormMode = Literal["pooled", "synchronized", "chunk"]
NUM_SWEEPS = 2
"""By default."""


class BatchNormPolicy:
    """Applies one of the modes to the batches of a run.

    Args:
        model: the module that is trained.
        mode: see :class:`Microbatching`.
        num_sweeps: how often ``"synchronized"`` runs all chunks.
    """

    def __init__(self, model: nn.Module, mode: BatchNormMode, num_sweeps: int = NUM_SWEEPS) -> None:
        self.layers = _layers(model)
        """Of batch normalisation, in the order of the model."""
        self._mode = mode
        self._pooled = PooledBatchNorm(model) if mode == "pooled" else None
        self._synchronized = SynchronizedBatchNorm(model) if mode == "synchronized" else None
        self._active = False
        self.num_sweeps = num_sweeps

    @property
    def has_layers(self) -> bool:
        """Whether the model has batch normalisation at all."""
        return bool(self.layers)

    def is_for(self, model: nn.Module, mode: BatchNormMode, num_sweeps: int) -> bool:
        """Whether this is what such arguments would make, for the layers that the model has now."""
        return (self._mode, self.num_sweeps) == (mode, num_sweeps) and self.layers == _layers(model)

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
        return [buffer for layer in self.layers for buffer in layer.buffers(recurse=False)]

    def run(
        self,
        num_chunks: int,
        run_chunks: Callable[[bool], _T],
        run_whole: Callable[[], object],
        save: Callable[[], Callable[[], None]],
    ) -> _T:
        """Run all chunks of a batch, as often as it takes.

        Args:
            num_chunks: of the batch.
            run_chunks: forward and backward of all of them; called with whether it is the last time.
            run_whole: forward of the whole batch, for its statistics; gradients are off.
            save: keeps the state before the batch, and returns what sets it back.

        Returns:
            What ``run_chunks`` returned the last time.
        """
        with self.batch(num_chunks):
            if self.synchronizes:
                set_back = save()
                with self.statistics_pass():
                    run_whole()
                for _ in range(self.num_sweeps - 1):
                    set_back()
                    with self.sweep():
                        run_chunks(False)
                set_back()
                with self.sweep():
                    result = run_chunks(True)
            else:
                result = run_chunks(True)
            self.finish()
        return result

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


def check_batchnorm(owner: str, mode: Any, num_sweeps: Any) -> None:
    """Refuse arguments that do not say what batch normalisation is to do.

    Args:
        owner: what the user has called.
        mode: its ``batchnorm``.
        num_sweeps: its ``num_batchnorm_sweeps``.

    Raises:
        ArgumentError: naming the argument.
    """
    check_choice(owner, "batchnorm", mode, get_args(BatchNormMode))
    check_count(owner, "num_batchnorm_sweeps", num_sweeps, optional=False)
    if num_sweeps != NUM_SWEEPS and mode != "synchronized":
        raise ArgumentError(
            f"`{owner}(num_batchnorm_sweeps)` needs batchnorm='synchronized', but got "
            f"num_batchnorm_sweeps={num_sweeps} with batchnorm={mode!r}. Leave it out."
        )


def _layers(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]
