"""Batch norm's running statistics over the chunks of a batch, pooled as if it had not been split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_memtrain.compat.torch_private import BatchNorm, is_backward_running
from lightning_memtrain.coordination import dry_run_depth
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.microbatching.batchnorm.pooled_statistics import (
    Statistics,
    add_statistics,
    num_replicas,
    pool_statistics,
    pooling_dtype,
    running_backward,
)

# At this momentum a layer's running statistics are those of its last call alone.
TAKE_THE_CALL = 1.0


class PooledBatchNorm:
    r"""Makes chunks of a batch leave the running statistics of all their values together.

    A chunk :math:`i` with :math:`n_i` values per channel, mean :math:`\mu_i` and unbiased variance
    :math:`v_i` is pooled with the others, :math:`N = \sum_i n_i`, to

    .. math::
        \mu = \frac{1}{N} \sum_i n_i \mu_i, \qquad
        v = \frac{1}{N - 1} \sum_i \left[(n_i - 1) v_i + n_i (\mu_i - \mu)^2\right],

    and the running statistics move towards these once, by the layer's own momentum. A layer that is called
    several times is pooled call by call, and moves once for each, as it would unsplit. What activation
    checkpointing runs again in the backward pass is not counted.

    Each chunk is still normalised by its own mean and variance, so gradients differ from those of the unsplit
    batch. So do the values that reach a layer behind another batch norm: the running statistics are exactly
    those of the values that the layer saw, and equal the unsplit batch's at the first layers.

    Under ``SyncBatchNorm`` a chunk's statistics are already those of all ranks, and are pooled by the number
    of values on this rank times the number of ranks: exact if all ranks have chunks of the same sizes.
    ``InstanceNorm`` keeps statistics per sample and needs no pooling.

    Args:
        model: its batch norm layers are found once, here; what is added later is not seen.

    Example:
        >>> layer = nn.BatchNorm1d(3)
        >>> pooled = PooledBatchNorm(layer)
        >>> with pooled.collecting(num_chunks=2):
        ...     for rows in torch.randn(8, 3).chunk(2):
        ...         with pooled.chunk():
        ...             layer(rows).sum().backward()
        ...     pooled.blend()
        >>> layer.num_batches_tracked
        tensor(1)

    References:
        Ioffe and Szegedy, Batch Normalization, ICML 2015, arXiv:1502.03167.
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
        COMPSTAT 1982.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            _Layer(name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm)
        ]
        # The layers that the batch at hand concerns; None between batches.
        self._active: list[_Layer] | None = None
        self._blended = False

    @contextmanager
    def collecting(self, num_chunks: int) -> Iterator[None]:
        """Run one batch; left without :meth:`blend`, the layers are as they were before.

        Args:
            num_chunks: chunks of this batch, at least 1. With 1 the layers run untouched, so that the result
                is plain batch norm's to the bit.

        Yields:
            Nothing.

        Raises:
            ArgumentError: if ``num_chunks`` is below 1, or a lazy layer has not seen its first input yet.
            RuntimeError: if another batch is being collected.
        """
        if num_chunks < 1:
            raise ArgumentError(
                "`PooledBatchNorm.collecting(num_chunks)` must be at least 1, but got "
                f"num_chunks={num_chunks}. Use 1 for a batch that is not split."
            )
        if self._active is not None:
            raise RuntimeError(
                "`PooledBatchNorm.collecting` must be left before it is entered again, but one batch is "
                "still being collected. Run batches one after the other."
            )
        self._active, self._blended = [], False
        try:
            for layer in self._layers:
                if layer.updates:
                    layer.start(untouched=num_chunks == 1)
                    self._active.append(layer)
            yield
        finally:
            # Whatever happens while values are put back, hooks and momentum are not left behind.
            layers, self._active = self._active, None
            before = [layer.stop() for layer in layers]
            if not self._blended:
                for layer, values in zip(layers, before, strict=True):
                    layer.write(*values)

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """Run the forward and backward pass of one chunk.

        Yields:
            Nothing.

        Raises:
            RuntimeError: outside :meth:`collecting`.
        """
        layers = self._open_batch("chunk")
        for layer in layers:
            layer.start_chunk()
        yield
        for layer in layers:
            layer.end_chunk()

    def blend(self) -> None:
        """Write the pooled statistics, all chunks having run; nothing may run after it in this batch.

        Raises:
            RuntimeError: outside :meth:`collecting`.
        """
        for layer in self._open_batch("blend"):
            layer.blend()
        self._blended = True

    def _open_batch(self, name: str) -> list[_Layer]:
        if self._active is None or self._blended:
            raise RuntimeError(
                f"`PooledBatchNorm.{name}` must be called inside `collecting()` and before `blend()`, but no "
                "batch is being collected. Enter `collecting(num_chunks)` first, once for each batch."
            )
        return self._active


class _Layer:
    """One batch norm layer during one batch.

    The statistics pooled so far wait in the layer's own buffers from one chunk to the next, so that all this
    costs is one copy of the buffers, however many chunks there are.
    """

    def __init__(self, name: str, module: BatchNorm) -> None:
        self.name = name
        self.module = module
        # Pooled so far, by the index of the call in its chunk; of the first call only the count is here.
        self._pooled: list[Statistics] = []
        self._first_count = 0
        self._held: tuple[Tensor, Tensor] | None = None
        # Calls of a compiled graph, which is keyed by the length of this list: so each chunk finds it empty.
        self.calls: list[tuple[Statistics, Tensor]] = []
        self._compiled: list[Statistics] = []
        self._num_calls = 0
        self._before: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._momentum: float | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def updates(self) -> bool:
        """Whether the next call would move the running statistics."""
        module = self.module
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ArgumentError(
                f"`PooledBatchNorm(model)` must have seen its first input, but got the lazy layer "
                f"{self.name!r}, whose size is not known. Run the model once before training."
            )
        return bool(module.training and module.track_running_stats) and module.running_mean is not None

    def start(self, *, untouched: bool) -> None:
        mean, variance, count = self._buffers()
        self._before = mean.clone(), variance.clone(), None if count is None else count.clone()
        if not untouched:
            self._momentum, self.module.momentum = self.module.momentum, TAKE_THE_CALL
            self._hooks = [
                self.module.register_forward_pre_hook(self._hold),
                self.module.register_forward_hook(self._record),
            ]

    def stop(self) -> tuple[Tensor | None, ...]:
        """Leave the layer as it was found, but for its statistics; those from before are returned."""
        if self._hooks:
            self.module.momentum = self._momentum
        for hook in self._hooks:
            hook.remove()
        before, self._before = self._before, None
        self._hooks, self._pooled, self._compiled, self._held = [], [], [], None
        self._first_count = 0
        self.start_chunk()
        return before or ()

    def start_chunk(self) -> None:
        self.calls.clear()
        self._num_calls = 0

    def end_chunk(self) -> None:
        self._put_back()
        forward = [statistics for statistics, in_backward in self.calls if not bool(in_backward)]
        for index, statistics in enumerate(forward):
            add_statistics(self._compiled, index, statistics)
        self.start_chunk()

    def blend(self) -> None:
        if not self._hooks or self._before is None:
            return  # ran untouched
        mean, variance, tracked = self._before
        dtype = pooling_dtype(mean)
        pooled = self._compiled
        if self._first_count:
            pooled = [Statistics(self._first_count, *self._buffers()[:2]), *self._pooled]
        new_mean, new_variance = mean.to(dtype), variance.to(dtype)
        for index, batch in enumerate(pooled):
            factor: float | Tensor
            if self._momentum is not None:
                factor = self._momentum
            else:  # cumulative mean: batch norm counts its own call first
                factor = 0.0 if tracked is None else 1 / (tracked + index + 1).to(dtype)
            new_mean = (1 - factor) * new_mean + factor * batch.mean.to(dtype)
            new_variance = (1 - factor) * new_variance + factor * batch.variance.to(dtype)
        self.write(new_mean, new_variance, None if tracked is None else tracked + len(pooled))

    def _hold(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """Keep what is pooled so far while the layer overwrites it."""
        if not torch.compiler.is_compiling() and self._first_count and not dry_run_depth():
            self._put_back()
            mean, variance, _ = self._buffers()
            self._held = mean.clone(), variance.clone()

    def _record(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if not torch.compiler.is_compiling() and dry_run_depth():
            return
        count = output.numel() // output.size(1) * num_replicas(self.module)
        mean, variance, _ = self._buffers()
        if count == 1:
            # 0 / 0 has no unbiased variance; left there, the NaN would outlive even momentum 1 (0 * NaN).
            variance.data.zero_()
        if torch.compiler.is_compiling():
            if self.module.training and count:
                # Asked when the graph runs, not when it is traced.
                self.calls.append(
                    (Statistics(count, mean.clone(), variance.clone()), running_backward(output))
                )
            return
        in_backward = is_backward_running()
        if self.module.training and count and not in_backward:
            index, self._num_calls = self._num_calls, self._num_calls + 1
            seen = Statistics(count, mean, variance)
            if index > 0:
                add_statistics(self._pooled, index - 1, seen)
            elif self._held is None:
                self._first_count = count
            else:
                pooled = pool_statistics(Statistics(self._first_count, *self._held), seen)
                self._first_count, self._held = pooled.num_values, (pooled.mean, pooled.variance)
        self._put_back()

    def _put_back(self) -> None:
        # Activation checkpointing may end a recomputation amid a layer, so this is also done later.
        held, self._held = self._held, None
        if held is not None:
            # Past autograd, which has saved these buffers for the backward pass, where it does not read them.
            mean, variance, _ = self._buffers()
            mean.data.copy_(held[0])
            variance.data.copy_(held[1])

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        module = self.module
        assert module.running_mean is not None
        assert module.running_var is not None
        return module.running_mean, module.running_var, module.num_batches_tracked

    def write(self, *values: Tensor | None) -> None:
        # In place: optimizers, averaged copies and DDP hold these very tensors.
        for buffer, value in zip(self._buffers(), values, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
