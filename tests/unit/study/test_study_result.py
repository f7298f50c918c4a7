"""Seeds put together and compared with the baseline, and the file that holds it."""

from __future__ import annotations

import json

import pytest

from lightning_memtrain.study.grid import read_grid
from lightning_memtrain.study.pareto_front import pareto_front
from lightning_memtrain.study.study_result import SCHEMA_VERSION, StudyResult, summarize
from tests.helpers.studies import finished_run, small_result


def test_mean_spread_and_what_is_lost_are_of_the_finished_runs():
    plain, half, both = small_result().variants
    assert (plain.num_runs, plain.num_finished, plain.scores) == (3, 2, (0.5, 0.75))
    assert plain.score == 0.625
    assert plain.score_spread == pytest.approx(0.1767766952966369)
    assert (plain.peak_bytes, plain.ledger_peak_bytes, plain.step_seconds) == (400, 360, 0.25)
    assert (plain.times_less, plain.times_slower, plain.score_change) == (1, 1, 0)
    assert (half.score, half.score_spread, half.score_change) == (0.5, None, -0.125)
    assert (half.times_less, half.times_slower) == (4, 2)
    assert (both.num_finished, both.peak_bytes, both.score, both.times_less) == (0, None, None, None)
    assert [row.on_front for row in small_result().variants] == [True, True, False]


def test_the_peak_is_that_of_the_highest_seed():
    grid = read_grid({"variants": {"plain": {}}})
    runs = [
        finished_run("plain", seed, 0.5, ledger, allocator)
        for seed, ledger, allocator in ((1, 9, 10), (2, 8, 12))
    ]
    (plain,) = summarize(grid, runs)
    assert (plain.peak_bytes, plain.ledger_peak_bytes) == (12, 8)
    assert plain.at_peak == {"activations": 8, "workspace": 4}


def test_less_is_better_where_the_grid_says_so():
    grid = read_grid({"score": {"metric": "loss", "mode": "min"}, "variants": {"a": {}, "b": {}}})
    runs = [finished_run("a", 1, 2.0, 10, 10), finished_run("b", 1, 1.0, 5, 5)]
    assert [row.on_front for row in summarize(grid, runs)] == [False, True]


def test_what_is_equal_is_not_beaten():
    assert pareto_front({"a": (1, 1), "b": (1, 1), "c": (2, 1), "d": (2, 0)}) == ["a", "b", "d"]


def test_a_result_comes_back_from_its_file(tmp_path):
    result, path = small_result(), tmp_path / "study.json"
    path.write_text(result.to_json())
    assert StudyResult.load(path) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "expected kind='lightning_memtrain study' and schema_version=1"),
        ({"kind": "other"}, "but got 'other'"),
        ({"runs": [{"name": 1}]}, "is no result of a study"),
    ],
)
def test_a_file_of_another_version_is_refused(tmp_path, change, message):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({**json.loads(small_result().to_json()), **change}))
    with pytest.raises(ValueError, match=message):
        StudyResult.load(path)
    assert SCHEMA_VERSION == 1
