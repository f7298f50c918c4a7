"""What ``training_step`` returned for the chunks of a batch, merged into what it returns for the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_memtrain.microbatching.merging.chunk_logs import ChunkLogs, LogRecorder
from lightning_memtrain.microbatching.splitting.chunks import Chunk, mean_weights


@dataclass
class BatchOutcome:
    """What came of the chunks of a batch so far.

    Args:
        sum_losses: whether the losses are sums over samples.
    """

    sum_losses: bool
    sum_of_losses: Tensor | None = None
    """Losses of the chunks so far, weighed, without a graph; ``None`` if no chunk had one."""
    chunks: list[Chunk] = field(default_factory=list)
    extras: list[Mapping[str, Any]] = field(default_factory=list)
    """What ``training_step`` returned beside the loss, chunk by chunk."""
    left_out: list[bool] = field(default_factory=list)
    """Whether it returned ``None``, chunk by chunk."""
    logs: ChunkLogs = field(init=False)

    def __post_init__(self) -> None:
        self.logs = ChunkLogs(self.sum_losses)

    @property
    def num_samples(self) -> int | None:
        """Samples of the whole batch, ``None`` if unknown."""
        sizes = [chunk.num_samples for chunk in self.chunks]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def loss(self) -> Tensor | None:
        """The loss of the whole batch, as far as it has one."""
        if self.sum_of_losses is None or self.factor == 1.0:
            return self.sum_of_losses
        return self.sum_of_losses * self.factor

    @property
    def num_left_out(self) -> int:
        """Chunks for which ``training_step`` returned ``None``."""
        return sum(self.left_out)

    @property
    def factor(self) -> float:
        """What the chunks that have a loss are weighed by, see :func:`factor_of_the_rest`."""
        return 1.0 if self.sum_losses else factor_of_the_rest(self.chunks, self.left_out)

    def merged_outputs(self) -> dict[str, Any]:
        """What ``training_step`` returns beside the loss for the chunks that have one."""
        kept = [i for i, out in enumerate(self.left_out) if not out]
        if not kept:
            return {}
        chunks = [replace(self.chunks[i], weight=self.chunks[i].weight * self.factor) for i in kept]
        return merge_outputs([self.extras[i] for i in kept], chunks)

    def add(
        self,
        chunk: Chunk,
        loss: Tensor | None,
        num_accumulated: int,
        extra: Mapping[str, Any],
        logs: LogRecorder,
    ) -> None:
        """Add a chunk that has run.

        Args:
            chunk: the chunk.
            loss: with one element of a floating-point dtype, divided by ``num_accumulated`` and not yet
                weighed.
            num_accumulated: batches over which gradients are accumulated.
            extra: what else it returned.
            logs: what it logged.
        """
        self.chunks.append(chunk)
        self.extras.append(extra)
        self.left_out.append(loss is None)
        self.logs.add(logs, chunk, None if loss is None else loss * num_accumulated)
        if loss is not None and chunk.weight > 0:
            weighted = loss if chunk.weight == 1.0 else loss * chunk.weight
            self.sum_of_losses = weighted if self.sum_of_losses is None else self.sum_of_losses + weighted


def factor_of_the_rest(chunks: Sequence[Chunk], left_out: Sequence[bool]) -> float:
    r"""What makes the weights of the chunks that have a loss add up to those of all.

    The mean over the samples that are left is :math:`\sum_{i \in K} \frac{n_i}{N_K} L_i` with
    :math:`N_K = \sum_{i \in K} n_i`, where :math:`K` are the chunks that have a loss.

    Args:
        chunks: of a batch.
        left_out: whether ``training_step`` returned ``None``, chunk by chunk.

    Returns:
        The factor, at least 1; 1 if no chunk is left.

    Example:
        >>> factor_of_the_rest([Chunk(None, 0.75), Chunk(None, 0.25)], [True, False])
        4.0
    """
    left = math.fsum(chunk.weight for chunk, out in zip(chunks, left_out, strict=True) if not out)
    if not any(left_out) or not left:
        return 1.0
    return math.fsum(chunk.weight for chunk in chunks) / left


def merge_outputs(outputs: Sequence[Mapping[str, Any]], chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Merge the entries that ``training_step`` returned beside its loss.

    Tensors, lists and tuples with one item per sample are joined in the order of the batch; floating-point
    tensors and numbers without such an axis are averaged, weighted as a mean loss is; mappings are merged
    entry by entry; anything else must be equal in all chunks. Tensors are detached: the graph of a chunk ends
    with it.

    Args:
        outputs: entries by name, one mapping per chunk.
        chunks: the chunks.

    Returns:
        The entries for the whole batch.

    Raises:
        MisconfigurationException: if the chunks' entries differ in name, or one cannot be merged.
    """
    if len(outputs) == 1:
        return dict(outputs[0])
    names = list(outputs[0])
    for output in outputs:
        if list(output) != names:
            raise MisconfigurationException(
                "`training_step` must return the same entries for every microbatch, but got "
                f"{names} for one and {list(output)} for another. Return all of them always."
            )
    return {name: _merge(f"{name!r}", [output[name] for output in outputs], chunks) for name in names}


def _merge(name: str, values: Sequence[Any], chunks: Sequence[Chunk]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return merge_outputs(values, chunks)
    if all(isinstance(value, Tensor) for value in values):
        return _merge_tensors(name, [value.detach() for value in values], chunks)
    if isinstance(first, (list, tuple)):
        lengths = [len(value) for value in values]
        if lengths == [chunk.num_samples for chunk in chunks]:
            return type(first)(item for value in values for item in value)
        if len(set(lengths)) == 1:
            # Not one item per sample: a fixed group of entries, such as (logits, labels).
            merged_items = [
                _merge(f"{name}[{i}]", [value[i] for value in values], chunks) for i in range(lengths[0])
            ]
            return type(first)(*merged_items) if hasattr(first, "_fields") else type(first)(merged_items)
    if isinstance(first, float):
        return sum(weight * value for weight, value in zip(mean_weights(chunks), values, strict=True))
    if all(type(value) is type(first) and value == first for value in values):
        return first
    raise _cannot_merge(name, first)


def _merge_tensors(name: str, values: Sequence[Tensor], chunks: Sequence[Chunk]) -> Tensor:
    if all(v.ndim and v.size(0) == chunk.num_samples for v, chunk in zip(values, chunks, strict=True)):
        return torch.cat(list(values))
    if len({v.shape for v in values}) == 1 and values[0].is_floating_point():
        return torch.stack([w * value for w, value in zip(mean_weights(chunks), values, strict=True)]).sum(0)
    if len({v.shape for v in values}) == 1 and all(torch.equal(value, values[0]) for value in values):
        return values[0]
    raise _cannot_merge(name, values[0])


def _cannot_merge(name: str, value: Any) -> MisconfigurationException:
    described = (
        f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )
    return MisconfigurationException(
        "`training_step` must return what can be merged over microbatches (one item per sample, a "
        f"floating-point mean, or the same for all), but got {name}: {described} that differs between them. "
        "Return it per sample, log it with `self.log`, or leave it out."
    )
