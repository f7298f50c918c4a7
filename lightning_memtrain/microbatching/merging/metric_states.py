"""What torchmetrics' metrics hold, kept and set back; every touch of what torchmetrics keeps private."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import BaseAggregator
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running

# What is not state: the module's own parts, how a metric is made, and methods that it has as attributes.
_NO_STATE = {*vars(nn.Module()), "_defaults", "_persistent", "_reductions", "_update_signature"}


def metrics_of(model: nn.Module) -> list[Metric]:
    """All metrics of a model, those within others among them."""
    return [module for module in model.modules() if isinstance(module, Metric)]


def outermost(metrics: list[Metric]) -> list[Metric]:
    """Metrics that are not within others."""
    inside = {id(part) for metric in metrics for part in metric.modules() if part is not metric}
    return [metric for metric in metrics if id(metric) not in inside]


def mergeable(metric: Metric) -> Metric | None:
    """The metric whose state over a batch is that of its chunks, merged.

    Args:
        metric: an outermost one.

    Returns:
        The metric itself, or the one that it shows class by class; ``None`` if its state cannot be merged, or
        depends on what is a sample.
    """
    while isinstance(metric, ClasswiseWrapper):
        metric = metric.metric
    alone = sum(isinstance(part, Metric) for part in metric.modules()) == 1
    is_wrapper = any(kind.__module__.startswith("torchmetrics.wrappers") for kind in type(metric).__mro__)
    if not alone or is_wrapper or isinstance(metric, BaseAggregator):
        return None
    return metric if metric.full_state_update is False and metric._defaults else None


def aggregator(metric: Metric) -> BaseAggregator | None:
    """The aggregator of plain numbers that a metric is, or that a wrapper of it has inside."""
    found = [part for part in metric.modules() if isinstance(part, BaseAggregator)]
    is_one = isinstance(metric, (BaseAggregator, Running, MinMaxMetric))
    return found[0] if len(found) == 1 and is_one else None


def state_of(metric: Metric) -> dict[str, Any]:
    """Everything that a metric changes when it is called, by attribute; metrics within have their own."""
    held = vars(metric).items()
    return {name: value for name, value in held if name not in _NO_STATE and not callable(value)}


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that can be changed in place: of tensors, and of lists but not of what is in them."""
    return {name: _copy(value) for name, value in state.items()}


def set_state(metric: Metric, state: dict[str, Any]) -> None:
    """Set attributes as they are, past all that a metric does about them."""
    vars(metric).update(state)


def empty_state(metric: Metric) -> dict[str, Any]:
    """The state of a metric that has seen nothing, on the device of the one it has."""
    # Not by `metric.reset()`, which empties lists in place.
    state: dict[str, Any] = {"_update_count": 0, "_computed": None}
    for name, default in metric._defaults.items():
        state[name] = []
        if isinstance(default, Tensor):
            state[name] = default.detach().clone().to(getattr(metric, name).device)
    return state


#: Attributes by which a metric asks no other rank: ranks may have different numbers of chunks.
UNSYNCHRONIZED = {"sync_on_compute": False, "_to_sync": False, "dist_sync_on_step": False}


def value_of_step(top: Metric, metric: Metric) -> Any:
    """The value that ``forward`` returns for the state that a metric has now."""
    before = metric._to_sync
    metric._to_sync, metric._computed = metric.dist_sync_on_step, None
    value = top.compute()
    metric._to_sync, metric._computed = before, None
    return value


@torch.no_grad()
def merge(metric: Metric, before: dict[str, Any], num_calls: int) -> None:
    """Merge the state of a batch into that from before, as ``Metric.forward`` does.

    Args:
        metric: with the state of the batch.
        before: of :func:`state_of`.
        num_calls: of the metric for the whole batch.
    """
    metric._update_count = before["_update_count"] + num_calls
    metric._computed = None
    metric._reduce_states({name: before[name] for name in metric._defaults})


def link_collections(model: nn.Module, called: set[int]) -> None:
    """Let metrics of a collection that share one state share that of the one that was called.

    Args:
        model: the module with the collections.
        called: identities of metrics.
    """
    for collection in model.modules():
        if not isinstance(collection, MetricCollection) or not collection._groups_checked:
            continue
        leaders = [getattr(collection, str(group[0])) for group in collection._groups.values()]
        if called.intersection(map(id, leaders)):
            collection._state_is_copy = False
            collection._compute_groups_create_state_ref()


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, (list, dict)) else value
