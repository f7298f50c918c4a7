"""Runs as processes: a few at a time, resumed when they were cut, and never two on one run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_memtrain.study.collect import collect, failure_file
from lightning_memtrain.study.grid import read_grid
from lightning_memtrain.study.running.run_processes import RunProcesses, explain_end
from lightning_memtrain.study.running.study_runner import Listener, Standing, StudyRunner
from lightning_memtrain.study.study_folder import StudyFolder, read_curve
from lightning_memtrain.study.study_plan import PlannedRun, StudyPlan, plan_study
from tests.helpers.studies import record

# Stands for a process of `memtrain run`: `how` is what becomes of it.
PROCESS = """
import json, os, pathlib, signal, sys, time
run, how = pathlib.Path(sys.argv[1]), sys.argv[2]
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(run.parent / "order.txt", "a") as order: order.write(f"{run.name} {how}\\n")
(run / "config.yaml").touch()
def say(state, **fields):
    (run / "run.json").write_text(json.dumps({**json.loads(sys.argv[3]), "state": state, **fields}))
if how == "finish": say("finished", num_parts=2)
if how == "fail": say("failed", reason="ValueError: a bug"); sys.exit(1)
if how == "refuse": sys.exit("memtrain: error: no such option")
if how == "die":
    (run / "checkpoints" / "last.ckpt").touch(); say("running"); os.kill(os.getpid(), signal.SIGKILL)
if how == "wait":
    def stop(*_): (run / "checkpoints" / "interrupted.ckpt").touch(); say("interrupted"); sys.exit(143)
    signal.signal(signal.SIGTERM, stop); (run / "waits").touch(); time.sleep(60)
"""
GRID = {"seeds": 1, "score": {"metric": "test/accuracy"}, "variants": {"a": {}, "b": {}, "c": {}}}


class Study:
    """A study in a folder whose runs are as each test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = StudyFolder(folder)
        self.grid = read_grid(GRID)
        self.plan: StudyPlan = plan_study("net", self.grid, {name: {} for name in "abc"})
        self.told: list[tuple[str, str]] = []
        self.standings: list[Standing] = []
        self.stopping = 0
        self.runner: StudyRunner | None = None

    def run(self, jobs: int = 1, **how: str) -> bool:
        fields = json.dumps(record(metrics={"test/accuracy": 0.5}).to_dict())

        def command(run: PlannedRun, resumed: bool) -> list[str]:
            end = how[run.variant]
            assert resumed == end.startswith("resume ")
            folder = str(self.folder.run(run.name))
            return [sys.executable, "-c", PROCESS, folder, end.removeprefix("resume "), fields]

        def stopped() -> None:
            self.stopping += 1

        listener = Listener(
            self.standings.append, lambda run, why: self.told.append((run.variant, why)), stopped
        )
        self.runner = StudyRunner(self.folder, self.plan, jobs, command, lambda _: dict(os.environ), listener)
        return self.runner.run()

    def order(self) -> list[str]:
        return (self.folder.path / "runs" / "order.txt").read_text().split("\n")[:-1]

    def states(self) -> dict[str, tuple[str, str]]:
        result = collect(self.folder, self.plan, self.grid, num_jobs=1)
        return {run.variant: (run.state, run.reason) for run in result.runs}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "runs").mkdir()
    return Study(tmp_path)


def test_a_study_goes_on_after_runs_that_fail_and_says_why(study):
    assert study.run(a="fail", b="refuse", c="finish")
    assert study.told == [("a", "ValueError: a bug"), ("b", "no such option"), ("c", "")]
    assert study.states() == {
        "a": ("failed", "ValueError: a bug"),
        "b": ("failed", "no such option"),
        "c": ("finished", ""),
    }
    last = study.standings[-1]
    assert (last.num_runs, last.num_finished, last.num_failed, last.seconds_left) == (3, 1, 2, 0)


def test_finished_runs_are_not_run_again_and_cut_ones_go_on_from_their_checkpoint(study):
    study.run(a="finish", b="die", c="refuse")
    assert study.states()["b"] == ("failed", "killed by SIGKILL, as by the system when memory runs out")

    again = Study(study.folder.path)
    assert again.run(a="never", b="resume finish", c="finish")
    assert again.order()[3:] == ["b-seed1 finish", "c-seed1 finish"]
    assert [state for state, _ in again.states().values()] == ["finished"] * 3


def test_what_was_cut_before_its_first_checkpoint_begins_in_an_empty_folder(study):
    left = study.folder.run("a-seed1") / "metrics.csv"
    left.parent.mkdir()
    left.touch()
    study.run(a="finish", b="finish", c="finish")
    assert not left.exists()


def test_so_many_run_at_a_time(study):
    seen = []
    start = RunProcesses.start

    def counted(self, *args, **kwargs):
        started = start(self, *args, **kwargs)
        seen.append(len(self))
        return started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunProcesses, "start", counted)
        study.run(jobs=2, a="finish", b="finish", c="finish")
    assert max(seen) == 2


def test_a_run_that_another_process_works_on_is_waited_for(study):
    """As after a study was killed whose runs live on."""
    lock = study.folder.lock("a-seed1")
    lock.parent.mkdir()
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)

    def end_elsewhere() -> None:
        while "c-seed1 finish" not in (study.folder.path / "runs" / "order.txt").read_text():
            time.sleep(0.05)
        (study.folder.run("a-seed1")).mkdir()
        (study.folder.run("a-seed1") / "run.json").write_text(json.dumps(record().to_dict()))
        held.close()

    (study.folder.path / "runs" / "order.txt").touch()
    thread = threading.Thread(target=end_elsewhere)
    thread.start()
    assert study.run(a="never", b="finish", c="finish")
    thread.join()
    assert study.order() == ["b-seed1 finish", "c-seed1 finish"]


def test_a_signal_lets_runs_end_with_a_checkpoint(study):
    def interrupt() -> None:
        while not (study.folder.run("a-seed1") / "waits").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert not study.run(a="wait", b="never", c="never")
    thread.join()
    assert study.stopping == 1
    assert study.order() == ["a-seed1 wait"]
    assert study.states() == {"a": ("cut", ""), "b": ("waiting", ""), "c": ("waiting", "")}
    assert study.folder.has_checkpoint("a-seed1")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_run_without_the_score_says_what_it_has(study):
    study.grid = read_grid({**GRID, "score": {"metric": "test/accurac"}})
    study.run(a="finish", b="finish", c="finish")
    state, reason = study.states()["a"]
    assert state == "finished"
    assert reason == (
        "the run logged no finite `test/accurac`, only test/accuracy. Did you mean `test/accuracy`?"
    )


def test_a_record_of_another_version_is_a_failure_that_says_so(study):
    run = study.folder.run("a-seed1")
    run.mkdir()
    (run / "run.json").write_text('{"kind": "lightning_memtrain run", "schema_version": 99}')
    state, reason = study.states()["a"]
    assert state == "failed"
    assert "schema_version=99" in reason


@pytest.mark.parametrize(
    ("code", "log", "reason"),
    [
        (1, "\n== first\nmemtrain: error: old\n\n== second\nTraceback\nValueError: new\n", "ValueError: new"),
        (2, "\n== first\nmemtrain: error: wrong\nat exit\n", "wrong"),
        (3, "\n== first\n", "exit code 3"),
        (-15, "\n== first\nx\n", "killed by SIGTERM"),
    ],
)
def test_the_reason_is_the_last_processes_own(code, log, reason):
    assert explain_end(code, log) == reason


def test_why_a_run_failed_is_forgotten_when_it_begins_again(study):
    study.run(a="refuse", b="finish", c="finish")
    assert failure_file(study.folder, "a-seed1").is_file()
    study.run(a="finish", b="never", c="never")
    assert not failure_file(study.folder, "a-seed1").exists()


def test_a_curve_is_read_from_rows_that_have_it(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/loss,x\n4,0.5,\n5,,1\n9,0.25,\n")
    assert read_curve(path, "val/loss") == [(4, 0.5), (9, 0.25)]
    assert read_curve(path, "other") == read_curve(tmp_path / "none.csv", "x") == []
