"""What torchmetrics keeps private and this library uses."""

from __future__ import annotations

from functools import cache

from lightning_memtrain.compat.private_names import PrivateAttribute

_STATES = "merge the states of a metric over microbatches"
_GROUPS = "let metrics of a collection share one state"
_NAMES = (
    PrivateAttribute("torchmetrics:Metric", "_update_count", _STATES),
    PrivateAttribute("torchmetrics:Metric", "_computed", _STATES),
    PrivateAttribute("torchmetrics:Metric", "_defaults", _STATES),
    PrivateAttribute("torchmetrics:Metric", "_forward_cache", _STATES),
    PrivateAttribute("torchmetrics:Metric", "_reduce_states", _STATES),
    PrivateAttribute("torchmetrics:Metric", "_to_sync", _STATES),
    PrivateAttribute("torchmetrics:MetricCollection", "_groups", _GROUPS),
    PrivateAttribute("torchmetrics:MetricCollection", "_groups_checked", _GROUPS),
    PrivateAttribute("torchmetrics:MetricCollection", "_state_is_copy", _GROUPS),
    PrivateAttribute("torchmetrics:MetricCollection", "_compute_groups_create_state_ref", _GROUPS),
)


@cache
def check_metrics() -> None:
    """See, once per run, that metrics are made as is expected.

    Raises:
        MissingNameError: naming what is missing.
    """
    for name in _NAMES:
        name.look_up()
