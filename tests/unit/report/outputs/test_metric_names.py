from __future__ import annotations

import pytest

from lightning_memtrain.core import MIB, Category
from lightning_memtrain.report.outputs.metric_names import breakdown_metrics
from tests.helpers.reports import deep_report, tiny_breakdown


def test_keys_and_values() -> None:
    metrics = breakdown_metrics(tiny_breakdown(), growth_bytes=MIB // 4)
    assert metrics == {
        "memory/peak_mib": 56,
        "memory/ledger_peak_mib": 50,
        "memory/at_peak/parameters_mib": 4,
        "memory/at_peak/gradients_mib": 1,
        "memory/at_peak/optimizer_state_mib": 8,
        "memory/at_peak/activations_mib": 32,
        "memory/at_peak/buffers_mib": 0,
        "memory/at_peak/inputs_mib": 2,
        "memory/at_peak/temporary_mib": 3,
        "memory/at_peak/gathered_weights_mib": 0,
        "memory/at_peak/unsharded_gradients_mib": 0,
        "memory/at_peak/buckets_mib": 0,
        "memory/at_peak/held_mib": 0,
        "memory/at_peak/workspace_mib": 6,
        "memory/max/parameters_mib": 4,
        "memory/max/gradients_mib": 4,
        "memory/max/optimizer_state_mib": 8,
        "memory/max/activations_mib": 32,
        "memory/max/buffers_mib": 0,
        "memory/max/inputs_mib": 2,
        "memory/max/temporary_mib": 5,
        "memory/max/gathered_weights_mib": 0,
        "memory/max/unsharded_gradients_mib": 0,
        "memory/max/buckets_mib": 0,
        "memory/max/held_mib": 0,
        "memory/recomputed_mib": 2,
        "memory/growth_mib": 0.25,
    }
    assert {type(value) for value in metrics.values()} == {float}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_have_the_same_tails(stage: str) -> None:
    fit = breakdown_metrics(tiny_breakdown())
    other = breakdown_metrics(tiny_breakdown(), stage)
    assert other == {key.replace("memory/", f"memory/{stage}/"): value for key, value in fit.items()}


def test_rows_add_up_to_the_peak() -> None:
    metrics = breakdown_metrics(deep_report().stages["fit"])
    rows = sum(metrics[f"memory/at_peak/{category}_mib"] for category in Category)
    assert rows == metrics["memory/peak_mib"]
