"""A study whose run is killed in the middle, and goes on from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_memtrain.study import StudyResult
from tests.helpers.cli import memtrain_forked


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


COMMAND = ["study", "cifar10_wrn28_2", "--grid=grid.yaml", "--study-dir=s", "--nice=0", "--jobs=1"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a study whose run was killed, and what the study said of it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid(folder / "once")))
    ended = memtrain_forked(*COMMAND, cwd=folder, WANDB_MODE="offline")
    assert ended.returncode == 1, ended.stderr
    (run,) = StudyResult.load(folder / "s" / "study.json").runs
    assert (run.state, run.reason) == ("failed", "killed by SIGKILL, as by the system when memory runs out")
    return folder, ended.stdout


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_checkpoint(killed):
    folder, said = killed
    assert "killed-seed3: failed: killed by SIGKILL" in said
    ended = memtrain_forked(*COMMAND, "--resume", cwd=folder, WANDB_MODE="offline")
    assert ended.returncode == 0, ended.stderr
    assert "killed-seed3: test/accuracy" in ended.stdout
    (run,) = StudyResult.load(folder / "s" / "study.json").runs
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
    logs = [path.name for path in Path(folder, "s/runs/killed-seed3/wandb").glob("offline-run-*")]
    assert len(logs) == 2
    assert len({name.split("-", 3)[3] for name in logs}) == 1
    assert Path(folder, "s/figures/peaks.svg").is_file()
