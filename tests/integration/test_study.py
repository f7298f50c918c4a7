"""A study with real runs: one is killed in the middle and goes on, one fails and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_memtrain.study import StudyResult
from tests.helpers.cli import memtrain

GRID = {
    "seeds": [3],
    "score": {"metric": "test/accuracy", "percent": True},
    "base": {
        "recipe_variants": "smoke",
        "config": {
            "trainer": {
                "max_epochs": 2,
                "limit_train_batches": 6,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "accelerator": "cpu",
            },
            "model": {"init_args": {"depth": 10, "widen_factor": 1}},
            "data": {"init_args": {"batch_size": 4}},
        },
    },
    "variants": {
        # In its second epoch, and only the first time: the second part finds the file.
        "killed": {"config": {"trainer": {"callbacks+": [{"class_path": "tests.helpers.cli.KillAt"}]}}},
        "wrong": {"config": {"trainer": {"callbacks+": [{"class_path": "tests.helpers.cli.RaiseIn"}]}}},
    },
}


@pytest.mark.slow
def test_a_study_goes_on_after_a_kill_and_says_why_a_run_failed(tmp_path: Path) -> None:
    GRID["variants"]["killed"]["config"]["trainer"]["callbacks+"][0]["init_args"] = {
        "batch": 8,
        "once": str(tmp_path / "killed"),
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    options = ("study", "cifar10_wrn28_2", "--grid=grid.yaml", "--study-dir=s", "--nice=0", "--jobs=1")
    first = memtrain(*options, cwd=tmp_path, WANDB_MODE="offline")
    assert first.returncode == 1, first.stderr
    result = StudyResult.load(tmp_path / "s" / "study.json")
    assert {run.variant: run.reason for run in result.runs} == {
        "killed": "killed by SIGKILL, as by the system when memory runs out",
        "wrong": "ValueError: a bug",
    }

    again = memtrain(*options, "--resume", "--variant=killed", cwd=tmp_path, WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr + again.stdout
    killed, wrong = StudyResult.load(tmp_path / "s" / "study.json").runs
    assert (killed.state, wrong.state) == ("finished", "failed")
    record = killed.record
    assert record is not None
    # Six steps until the checkpoint, and six after it.
    assert (record.num_parts, record.num_steps, record.total_steps, record.seed) == (2, 12, 12, 3)
    assert killed.score == record.metrics["test/accuracy"]
    assert record.peak_bytes is not None
    assert sum(record.at_peak.values()) == record.peak_bytes
    assert record.study["variant"] == "killed"
    assert record.study["settings"]["seed_everything"] == 3
    assert "killed-seed3: test/accuracy" in again.stdout
    # Both parts are one run of W&B, in the group of the study.
    logs = [path.name for path in (tmp_path / "s" / "runs" / "killed-seed3" / "wandb").glob("offline-run-*")]
    assert len({name.split("-", 3)[3] for name in logs}) == 1
    assert json.loads((tmp_path / "s" / "plan.json").read_text())["recipe"] == "cifar10_wrn28_2"
