"""What the chunks of a batch log, merged into what the whole batch would have logged.

Each chunk logs into a scratch collection that only writes down the calls. Once all chunks have run, the calls
are merged and made once on Lightning's own collection: means are weighted as the loss is, ``sync_dist``
communicates as often as without splitting (so ranks may have different numbers of chunks), and a chunk that
has to be run again leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_memtrain.microbatching.splitting.chunks import Chunk
from lightning_memtrain.microbatching.training_loop import ResultCollection

# Which call it is of those with the same hook and name: a step may log one name several times.
_Key = tuple[str, str, int]


class Source(NamedTuple):
    """Where a number that is logged comes from.

    Args:
        key: which call of which metric has returned it.
        leaf: in which tensor of what that returned.
        offset: as which element of it.
    """

    key: Any
    leaf: int
    offset: int


@dataclass
class LogCall:
    """One call of ``self.log``.

    Args:
        fx: hook in which it was made, e.g. ``"training_step"``.
        name: logged name.
        value: a tensor with one element, or a metric.
        options: all other arguments of the result collection's ``log``.
        source: the metric that has returned the value; ``None`` if none has.
    """

    fx: str
    name: str
    value: Tensor | Metric
    options: dict[str, Any]
    source: Source | None = None

    @property
    def batch_size(self) -> int | None:
        """The batch size given by the user."""
        return self.options.get("batch_size")

    @property
    def reduction(self) -> str:
        """``"mean"``, ``"sum"``, ``"max"`` or ``"min"``, however it was given; Lightning refuses others."""
        reduce_fx = self.options.get("reduce_fx", "mean")
        return str(getattr(reduce_fx, "__name__", reduce_fx)).lower()


class LogRecorder(ResultCollection):
    """Stands in for the trainer's result collection and writes calls down instead of making them."""

    def __init__(self) -> None:
        super().__init__(training=True)
        self.calls: dict[_Key, LogCall] = {}
        self.resets: list[str] = []
        self.source: Source | None = None
        """Of the value that is logged next."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(self, fx: str, name: str, value: Tensor | Metric, **options: Any) -> None:
        """Write a call down.

        Args:
            fx: hook in which it was made.
            name: logged name.
            value: a tensor of any dtype with one element, or a metric.
            **options: all other arguments of the result collection's ``log``.
        """
        if isinstance(value, Tensor) and not options.get("enable_graph", False):
            value = value.detach()
        occurrence = 0
        while (fx, name, occurrence) in self.calls:
            occurrence += 1
        self.calls[fx, name, occurrence] = LogCall(fx, name, value, options, self.source)
        self.source = None

    def logged_values(self) -> list[Tensor | Metric]:
        """All values, in order."""
        return [call.value for call in self.calls.values()]

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Write down that a hook's values of the epoch before are to be forgotten."""
        if fx is not None and fx not in self.resets:
            self.resets.append(fx)


@dataclass
class ChunkLogs:
    """All calls of the chunks of one batch.

    Args:
        sum_losses: whether the losses are sums over samples.
    """

    sum_losses: bool = False
    _recorders: list[LogRecorder] = field(default_factory=list)
    _chunks: list[Chunk] = field(default_factory=list)
    _losses: list[Tensor | None] = field(default_factory=list)

    def add(self, recorder: LogRecorder, chunk: Chunk, loss: Tensor | None) -> None:
        """Take over what a chunk logged.

        Args:
            recorder: its calls.
            chunk: the chunk.
            loss: its own loss, before weighing, with one element of a floating-point dtype; ``None`` if it is
                left out.
        """
        self._recorders.append(recorder)
        self._chunks.append(chunk)
        self._losses.append(loss)

    def metrics_on_step(self) -> list[Metric]:
        """The metric objects that were logged for the step."""
        calls = (call for recorder in self._recorders for call in recorder.calls.values())
        found = {
            id(c.value): c.value for c in calls if isinstance(c.value, Metric) and c.options.get("on_step")
        }
        return list(found.values())

    def sources(self) -> set[Source]:
        """Where values come from that metrics have returned, and that were logged as they are."""
        calls = (call for recorder in self._recorders for call in recorder.calls.values())
        return {call.source for call in calls if call.source is not None}

    def sizes(self, numbers: Sequence[int]) -> list[float]:
        """Samples of some chunks; 0 where that is not known."""
        return [float(self._chunks[i].num_samples or 0) for i in numbers]

    def replay(
        self, results: Any, batch_size: int | None, returned: Mapping[Source, Tensor] | None = None
    ) -> None:
        """Log once for the whole batch.

        Args:
            results: the trainer's result collection.
            batch_size: samples of the whole batch, ``None`` if unknown.
            returned: what metrics return for the whole batch, tensors of any dtype with one element.
        """
        for fx in dict.fromkeys(fx for recorder in self._recorders for fx in recorder.resets):
            results.reset(metrics=False, fx=fx)
        for key in dict.fromkeys(key for recorder in self._recorders for key in recorder.calls):
            logged = [
                (i, recorder.calls[key])
                for i, recorder in enumerate(self._recorders)
                if key in recorder.calls
            ]
            # Without the chunks that are left out, unless they alone log a name.
            logged = [(i, call) for i, call in logged if self._losses[i] is not None] or logged
            numbers, calls = [i for i, _ in logged], [call for _, call in logged]
            last = calls[-1]
            sizes, added_up = self._explicit_sizes(numbers, calls, batch_size)
            value, source = last.value, last.source
            known = returned is not None and source in returned
            if known and all(call.source == source for call in calls):
                value = returned[source]  # type: ignore[index]
            # After backward of the last chunk all gradients are in, as after backward of the whole batch.
            elif isinstance(value, Tensor) and last.fx != "on_after_backward":
                values = [call.value for call in calls if isinstance(call.value, Tensor)]
                value = self.merge_values(numbers, values, last.reduction, sizes)
            results.log(last.fx, last.name, value, **{**last.options, "batch_size": added_up})

    def _explicit_sizes(
        self, numbers: Sequence[int], calls: Sequence[LogCall], batch_size: int | None
    ) -> tuple[list[int] | None, int | None]:
        """Batch sizes that the user gave, as weights, and the batch size to log the whole batch with."""
        sizes = [call.batch_size for call in calls if call.batch_size is not None]
        if len(sizes) < len(calls):
            return None, calls[-1].batch_size
        # The whole batch's size, or 1, in every chunk is a constant of the user's, not the size of a chunk.
        counted = [self._chunks[i].num_samples for i in numbers]
        if set(sizes) in ({1}, {batch_size}) and sizes != counted:
            return None, sizes[0]
        return (sizes if sum(sizes) else None), sum(sizes)

    def merge_values(
        self,
        numbers: Sequence[int],
        given: Sequence[Tensor],
        reduction: str,
        sizes: Sequence[float] | None = None,
    ) -> Tensor:
        """Merge what chunks say about themselves into what the whole batch would.

        Args:
            numbers: of the chunks.
            given: what they say, tensors of one shape and of any dtype but complex ones.
            reduction: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``.
            sizes: over how much each is a mean; by default as the loss is.

        Returns:
            The merged value.
        """
        if len(given) == 1:
            return given[0]
        kept: Sequence[int] = range(len(numbers))
        if reduction == "mean":  # of what is left, unless nothing is
            kept = [k for k in kept if self._losses[numbers[k]] is not None] or kept
        numbers, sizes = [numbers[k] for k in kept], sizes and [sizes[k] for k in kept]
        values = torch.stack([given[k] for k in kept])
        if not values.is_floating_point() or values.dtype in (torch.float16, torch.bfloat16):
            values = values.to(torch.get_default_dtype())
        weights = [self._chunks[i].weight for i in numbers]
        total = math.fsum(weights)
        if len(numbers) < len(self._chunks) and not self.sum_losses and total > 0:
            # A name that some chunks did not log is a mean over those that did.
            weights = [weight / total for weight in weights]
        as_loss = _weighted_sum(values, weights)
        if reduction in ("max", "min", "sum"):
            merged: Tensor = getattr(values, {"max": "amax", "min": "amin", "sum": "sum"}[reduction])(dim=0)
        elif sizes is None and not self.sum_losses:
            return as_loss
        else:
            counts = sizes if sizes is not None else [self._chunks[i].num_samples or 1 for i in numbers]
            merged = _weighted_sum(values, [count / sum(counts) for count in counts])
        losses = [self._losses[i] for i in numbers]
        num_with_loss = sum(loss is not None for loss in self._losses)
        if any(loss is None for loss in losses) or len(numbers) < num_with_loss or values.ndim > 1:
            return merged
        # Whatever it is to be reduced by later, a value that is the loss in every chunk is the loss of the
        # whole batch. Compared on the device, since a look at the values would wait for it.
        own = torch.stack([loss.to(values) for loss in losses if loss is not None])
        return torch.where(
            torch.isclose(values, own, rtol=1e-6, atol=0.0, equal_nan=True).all(), as_loss, merged
        )


def _weighted_sum(values: Tensor, weights: Sequence[float]) -> Tensor:
    # A chunk without weight may have a mean over nothing, which is NaN and not 0 times anything.
    counting = [i for i, weight in enumerate(weights) if weight > 0]
    if len(counting) < len(weights):
        values, weights = values[counting], [weights[i] for i in counting]
    # In double precision, so that a constant stays what it is.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    factors = torch.tensor(weights, dtype=dtype, device=values.device)
    factors = factors.view(-1, *[1] * (values.ndim - 1))
    return (values.to(dtype) * factors).sum(dim=0).to(values.dtype)
