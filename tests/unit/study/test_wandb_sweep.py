"""A study as a sweep: what W&B's agent makes of it is a study of one run."""

from __future__ import annotations

import pytest

from lightning_memtrain.study.grid import read_grid
from lightning_memtrain.study.study_plan import plan_study
from lightning_memtrain.study.wandb_sweep import sweep_config

GRID = {"seeds": 2, "score": {"metric": "val/loss", "mode": "min"}, "variants": {"plain": {}, "half": {}}}
COMMAND = ["memtrain", "study", "net", "--jobs=1"]


def sweep_of(data: dict) -> dict:
    grid = read_grid(data)
    return sweep_config(plan_study("net", grid, {"plain": {}, "half": {}}), grid, COMMAND, "project")


def test_the_sweep_is_of_all_runs():
    assert sweep_of(GRID) == {
        "name": "net study",
        "project": "project",
        "method": "grid",
        "parameters": {
            "run": {"values": ["plain-seed1", "half-seed1", "plain-seed2", "half-seed2"]},
        },
        "command": ["${env}", "memtrain", "study", "net", "--jobs=1", "${args}"],
        "metric": {"name": "val/loss", "goal": "minimize"},
    }


def test_wandbs_agent_makes_the_command_of_one_run_of_it():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = sweep_of(GRID)
    made = utils.create_sweep_command(list(sweep["command"]))
    arguments = utils.create_sweep_command_args({"args": {"run": {"value": "half-seed2"}}})
    words = [word for part in made for word in (arguments["args"] if part == "${args}" else [part])]
    assert words == ["${env}", *COMMAND, "--run=half-seed2"]


def test_wandbs_own_schema_accepts_it():
    sweeps = pytest.importorskip("sweeps", reason="W&B's schema is in its package `sweeps`")
    from sweeps.config import schema_violations_from_proposed_config

    assert sweeps
    assert schema_violations_from_proposed_config(sweep_of(GRID)) == []
    assert schema_violations_from_proposed_config({**sweep_of(GRID), "method": "all"}) != []
