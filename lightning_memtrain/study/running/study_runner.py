"""Runs a study: a few runs at a time, until all are finished or have failed."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from lightning_memtrain.study.collect import failure_file
from lightning_memtrain.study.run_record import RunRecord
from lightning_memtrain.study.running.run_processes import RunProcesses, explain_end
from lightning_memtrain.study.running.time_left import Running, seconds_left
from lightning_memtrain.study.study_folder import StudyFolder
from lightning_memtrain.study.study_plan import PlannedRun, StudyPlan

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_SHOWN = 1.0
_LOG_BYTES = 64 * 1024
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Standing:
    """How far a study is.

    Args:
        num_runs: how many runs there are.
        num_finished: how many of them are finished.
        num_failed: how many have failed.
        running: those under way, with what they say of themselves.
        seconds_left: an estimate; ``None`` as long as nothing is known.
    """

    num_runs: int
    num_finished: int
    num_failed: int
    running: Mapping[str, RunRecord | None] = field(default_factory=dict)
    seconds_left: float | None = None


@dataclass(frozen=True)
class Listener:
    """Who is told what happens.

    Args:
        shown: about once a second.
        ended: after each run, with why it failed, ``""`` if it did not.
        stopping: after a signal to end.
    """

    shown: Callable[[Standing], None]
    ended: Callable[[PlannedRun, str], None]
    stopping: Callable[[], None]


class StudyRunner:
    """Starts the runs that are not finished, resumes those that were cut, and keeps why others failed.

    Args:
        folder: of the study.
        plan: the runs that are wanted.
        jobs: runs at a time, at least 1.
        command: of a run, given whether it is resumed.
        env: environment of a run's process.
        listener: who is told.
    """

    def __init__(
        self,
        folder: StudyFolder,
        plan: StudyPlan,
        jobs: int,
        command: Callable[[PlannedRun, bool], Sequence[str]],
        env: Callable[[PlannedRun], Mapping[str, str]],
        listener: Listener,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._jobs = jobs
        self._command = command
        self._env = env
        self._listener = listener
        self._processes = RunProcesses()
        self._run_of = {run.name: run for run in plan.runs}
        self._finished: dict[str, float] = {}
        self._failed: set[str] = set()
        self._signals = 0

    def run(self) -> bool:
        """Go on until nothing is left to do.

        Returns:
            Whether it came to its end; ``False`` if a signal has stopped it.
        """
        waiting = [run for run in self._plan.runs if not self._is_finished(run)]
        shown, told = 0.0, False
        with self._listening():
            while waiting or len(self._processes):
                for name, code in self._processes.ended().items():
                    self._end(self._run_of[name], code)
                if self._signals:
                    waiting = []
                    if not told:
                        told = True
                        self._listener.stopping()
                self._start_some(waiting)
                if time.monotonic() - shown > _SECONDS_BETWEEN_SHOWN:
                    shown = time.monotonic()
                    self._listener.shown(self.standing(waiting))
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        self._listener.shown(self.standing([]))
        return self._signals == 0

    def standing(self, waiting: Sequence[PlannedRun]) -> Standing:
        """How far the study is.

        Args:
            waiting: the runs that are still to begin.

        Returns:
            The numbers of runs, those under way, and the time left.
        """
        records = {name: self._record(name) for name in self._processes.names}
        finished: dict[str, list[float]] = {}
        for name, seconds in self._finished.items():
            finished.setdefault(self._run_of[name].variant, []).append(seconds)
        running = [
            Running(self._run_of[name].variant, record.seconds if record else 0.0, _fraction(record))
            for name, record in records.items()
        ]
        return Standing(
            num_runs=len(self._plan.runs),
            num_finished=len(self._finished),
            num_failed=len(self._failed),
            running=records,
            seconds_left=seconds_left(finished, running, [run.variant for run in waiting], self._jobs),
        )

    def _is_finished(self, run: PlannedRun) -> bool:
        record = self._record(run.name)
        if record is None or record.state != "finished":
            return False
        self._finished[run.name] = record.seconds
        return True

    def _record(self, name: str) -> RunRecord | None:
        try:
            return self._folder.record(name)
        except ValueError:
            return None

    def _start_some(self, waiting: list[PlannedRun]) -> None:
        """Start as many as there is room for; what another study works on comes later."""
        for run in list(waiting):
            if len(self._processes) >= self._jobs:
                return
            if self._start(run) or self._is_finished(run):
                waiting.remove(run)

    def _start(self, run: PlannedRun) -> bool:
        folder = self._folder

        def make_command() -> Sequence[str] | None:
            if self._is_finished(run):
                return None
            failure_file(folder, run.name).unlink(missing_ok=True)
            resumed = folder.has_checkpoint(run.name)
            if not resumed and folder.run(run.name).is_dir():
                shutil.rmtree(folder.run(run.name))  # it was cut before its first checkpoint
            return self._command(run, resumed)

        return self._processes.start(
            run.name,
            make_command,
            env=self._env(run),
            log=folder.log(run.name),
            lock=folder.lock(run.name),
        )

    def _end(self, run: PlannedRun, code: int) -> None:
        if self._is_finished(run):
            self._listener.ended(run, "")
            return
        record = self._record(run.name)
        if self._signals and (record is None or record.state != "failed"):
            return  # it goes on when the study is resumed
        reason = record.reason if record is not None and record.state == "failed" else ""
        reason = reason or explain_end(code, self._log_end(run.name))
        self._failed.add(run.name)
        failure_file(self._folder, run.name).write_text(f"{reason}\n", encoding="utf-8")
        self._listener.ended(run, reason)

    def _log_end(self, name: str) -> str:
        with self._folder.log(name).open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _LOG_BYTES))
            return log.read().decode(errors="replace")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Take signals over: the first lets runs end with a checkpoint, the second ends them at once."""
        before = {signum: signal.signal(signum, self._on_signal) for signum in _SIGNALS}
        try:
            yield
        finally:
            self._processes.send(signal.SIGTERM)  # left over only after an error of this process
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> Any:
        self._signals += 1
        self._processes.send(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)


def _fraction(record: RunRecord | None) -> float:
    if record is None or not record.total_steps:
        return 0.0
    return min(1.0, record.num_steps / record.total_steps)
