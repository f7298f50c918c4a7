"""The runs of a grid, in their order and with their seeds; and how plans differ."""

from __future__ import annotations

import pytest

from lightning_memtrain.study.grid import read_grid
from lightning_memtrain.study.study_plan import (
    StudyPlan,
    differences,
    name_differences,
    plan_study,
)

GRID = read_grid(
    {
        "seeds": 2,
        "seed_keys": ["seed_everything", "data.init_args.seed"],
        "variants": {"plain": {}, "slow": {"seeds": [5]}},
    }
)
OVERLAYS = {"plain": {"data": {"init_args": {"size": 3}}}, "slow": {"trainer": {"callbacks": ["A", "B"]}}}


def test_the_first_seed_of_every_variant_comes_first():
    plan = plan_study("net", GRID, OVERLAYS)
    assert [(run.name, run.variant, run.seed) for run in plan.runs] == [
        ("plain-seed1", "plain", 1),
        ("slow-seed5", "slow", 5),
        ("plain-seed2", "plain", 2),
    ]
    assert plan.runs[2].config == {"data": {"init_args": {"size": 3, "seed": 2}}, "seed_everything": 2}
    assert OVERLAYS["plain"] == {"data": {"init_args": {"size": 3}}}  # not written into
    assert [run.name for run in plan.only(("plain",), (2,)).runs] == ["plain-seed2"]


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan = plan_study("net", GRID, OVERLAYS)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert StudyPlan.load(path) == plan
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"plan.json` is no plan of a study"):
        StudyPlan.load(path)


def test_differences_are_named_once_for_all_seeds():
    plan = plan_study("net", GRID, OVERLAYS)
    other = {"plain": {"data": {"init_args": {"size": 4}}}, "slow": {"trainer": {"callbacks": ["A", "C"]}}}
    assert differences(plan, plan) == []
    assert differences(plan, plan_study("other", GRID, OVERLAYS)) == ["the recipe is `other`, but was `net`"]
    assert differences(plan, plan_study("net", GRID, other)) == [
        "`data.init_args.size` of `plain` is 4, but was 3",
        '`trainer.callbacks[1]` of `slow` is "C", but was "B"',
    ]
    less = {"plain": {}, "slow": OVERLAYS["slow"]}
    assert differences(plan, plan_study("net", GRID, less)) == [
        "`data.init_args.size` of `plain` is not set, but was 3"
    ]


def test_more_may_be_asked_for_and_not_less():
    fewer = plan_study("net", read_grid({"seeds": 1, "variants": {"plain": {}}}), OVERLAYS)
    more = plan_study("net", read_grid({"seeds": 2, "variants": {"plain": {}, "slow": {}}}), OVERLAYS)
    assert differences(fewer, more) == []
    assert differences(more, fewer) == [
        f"the run `{name}` is no longer asked for" for name in ("slow-seed1", "plain-seed2", "slow-seed2")
    ]
    assert name_differences([str(n) for n in range(7)]) == "0; 1; 2; 3; 4; and 2 more"
