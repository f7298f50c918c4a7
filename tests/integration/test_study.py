"""A study whose run is killed in the middle, and goes on from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_memtrain.cli import main
from lightning_memtrain.study import StudyResult
from tests.helpers.cli import IGNORED, environment

pytestmark = pytest.mark.filterwarnings(*IGNORED)


def grid(once: Path) -> dict[str, object]:
    """WRN-10-1 for two epochs of six steps, which is killed in the second one if `once` is not there yet."""
    kill = {"class_path": "tests.helpers.cli.KillAt", "init_args": {"batch": 8, "once": str(once)}}
    trainer = {"max_epochs": 2, "limit_train_batches": 6, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    small = {
        "model": {"init_args": {"depth": 10, "widen_factor": 1}},
        "data": {"init_args": {"batch_size": 4}},
    }
    return {
        "seeds": [3],
        "score": {"metric": "test/accuracy", "percent": True},
        "base": {"recipe_variants": "smoke", "config": {"trainer": {**trainer, **quiet}, **small}},
        "variants": {"killed": {"config": {"trainer": {"callbacks+": [kill]}}}},
    }


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in environment(WANDB_MODE="offline").items():
        monkeypatch.setenv(name, value)
    Path("grid.yaml").write_text(yaml.safe_dump(grid(tmp_path / "once")))
    command = ["study", "cifar10_wrn28_2", "--grid=grid.yaml", "--study-dir=s", "--nice=0", "--jobs=1"]

    assert main(command) == 1
    (run,) = StudyResult.load(Path("s/study.json")).runs
    assert (run.state, run.reason) == ("failed", "killed by SIGKILL, as by the system when memory runs out")
    assert "killed-seed3: failed: killed by SIGKILL" in capfd.readouterr().out

    assert main([*command, "--resume"]) == 0
    assert "killed-seed3: test/accuracy" in capfd.readouterr().out
    (run,) = StudyResult.load(Path("s/study.json")).runs
    record = run.record
    assert record is not None
    # Six steps until the checkpoint, and six after it.
    assert (record.num_parts, record.num_steps, record.total_steps, record.seed) == (2, 12, 12, 3)
    assert run.score == record.metrics["test/accuracy"]
    assert record.peak_bytes is not None
    assert sum(record.at_peak.values()) == record.peak_bytes
    assert record.study["variant"] == "killed"
    assert record.study["settings"]["seed_everything"] == 3
    # Both parts are one run of W&B.
    logs = [path.name for path in Path("s/runs/killed-seed3/wandb").glob("offline-run-*")]
    assert len(logs) == 2
    assert len({name.split("-", 3)[3] for name in logs}) == 1
    assert Path("s/figures/peaks.svg").is_file()
