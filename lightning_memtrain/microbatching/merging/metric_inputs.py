"""What metrics were given for the chunks of a batch, joined into what they are given for the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MaxMetric, Metric, MinMetric, SumMetric

from lightning_memtrain.microbatching.merging.chunk_logs import ChunkLogs
from lightning_memtrain.microbatching.merging.metric_states import aggregator

# How numbers without an axis of samples are joined: as `self.log` does with this `reduce_fx`.
_REDUCTIONS: dict[type[Metric], str] = {SumMetric: "sum", MaxMetric: "max", MinMetric: "min"}


class CannotJoin(Exception):
    """What chunks gave to a metric does not tell what the whole batch would have given."""


class InputJoiner:
    """Joins the arguments of one call over chunks.

    Args:
        logs: knows how much each chunk counts, and its loss.
    """

    def __init__(self, logs: ChunkLogs) -> None:
        self._logs = logs

    def join(
        self, metric: Metric, numbers: Sequence[int], calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Join the arguments that chunks gave to one call of a metric.

        What has an axis is one after the other along the first. Numbers without are means over the samples of
        their chunk, as the loss is, and weighed like it; other reductions are those of the metric.

        Args:
            metric: that was called.
            numbers: of the chunks in which it was.
            calls: arguments, and arguments by name.

        Returns:
            The same for the whole batch.

        Raises:
            CannotJoin: if the calls differ in what they pass, or in what cannot be joined.
        """
        base = aggregator(metric)
        if base is not None:
            return self._join_numbers(base, numbers, calls)
        args = [args for args, _ in calls]
        kwargs = [kwargs for _, kwargs in calls]
        return tuple(self._join_items(numbers, args)), self._join_mappings(numbers, kwargs)

    def _join_numbers(
        self, base: Metric, numbers: Sequence[int], calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = [{**dict(zip(("value", "weight"), args, strict=False)), **kwargs} for args, kwargs in calls]
        values = [torch.as_tensor(one["value"]) for one in named if "value" in one]
        weights = [torch.as_tensor(one["weight"]) for one in named if "weight" in one]
        if len(values) < len(calls) or len(weights) not in (0, len(calls)):
            raise CannotJoin
        reduction = next((name for kind, name in _REDUCTIONS.items() if isinstance(base, kind)), "mean")
        if self._are_per_sample(numbers, values):
            if not weights:
                return (torch.cat(values),), {}
            rows = [weight.expand_as(value) for weight, value in zip(weights, values, strict=True)]
            return (torch.cat(values),), {"weight": torch.cat(rows)}
        if any(weight.numel() > 1 for weight in weights) or len({value.shape for value in values}) > 1:
            raise CannotJoin
        counts = [float(weight) for weight in weights]
        # A weight of 1 is no number of samples, unless all chunks have one.
        counted = sum(counts) > 0 and (set(counts) != {1.0} or self._logs.sizes(numbers) == counts)
        joined = self._logs.merge_values(numbers, values, reduction, counts if counted else None)
        return (joined,), {"weight": sum(counts)} if counted else {}

    def _are_per_sample(self, numbers: Sequence[int], values: Sequence[Tensor]) -> bool:
        """Whether values have rows for samples, or for parts of samples such as tokens."""
        if any(value.ndim == 0 for value in values):
            return False
        rows = [value.size(0) for value in values]
        shares = zip(rows, self._logs.sizes(numbers), strict=True)
        return len(set(rows)) > 1 or all(size and not row % size for row, size in shares)

    def _join_items(self, numbers: Sequence[int], items: Sequence[Sequence[Any]]) -> list[Any]:
        if len({len(item) for item in items}) > 1:
            raise CannotJoin
        return [self._join(numbers, values) for values in zip(*items, strict=True)]

    def _join_mappings(self, numbers: Sequence[int], mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if len({tuple(mapping) for mapping in mappings}) > 1:
            raise CannotJoin
        return {name: self._join(numbers, [mapping[name] for mapping in mappings]) for name in mappings[0]}

    def _join(self, numbers: Sequence[int], values: Sequence[Any]) -> Any:
        first = values[0]
        if all(isinstance(value, Tensor) for value in values):
            return self._join_tensors(numbers, values)
        if all(isinstance(value, Mapping) for value in values):
            return self._join_mappings(numbers, values)
        if all(isinstance(value, (list, tuple)) for value in values):
            lengths: list[float] = [len(value) for value in values]
            if lengths == self._logs.sizes(numbers) or len(set(lengths)) > 1:
                return type(first)(item for value in values for item in value)
            return type(first)(self._join_items(numbers, values))
        if all(type(value) is float for value in values):
            return float(self._logs.merge_values(numbers, [torch.tensor(value) for value in values], "mean"))
        if all(type(value) is type(first) and value == first for value in values):
            return first
        raise CannotJoin

    def _join_tensors(self, numbers: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        if all(value.ndim for value in values) and len({value.shape[1:] for value in values}) == 1:
            return torch.cat(list(values))
        if any(value.ndim for value in values):
            raise CannotJoin
        if values[0].is_floating_point():
            return self._logs.merge_values(numbers, values, "mean")
        if all(torch.equal(value, values[0]) for value in values):
            return values[0]
        raise CannotJoin
