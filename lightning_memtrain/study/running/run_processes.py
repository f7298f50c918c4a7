"""Processes of runs: started, waited for, and ended together."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Before the output of each process that has worked on a run.
_MARK = "== "


@dataclass(frozen=True)
class Started:
    """A process that works on a run.

    Args:
        process: the process, which leads a session of its own: a Ctrl-C in the terminal does not reach it.
        lock: descriptor of the run's lock, which the process holds, too.
    """

    process: subprocess.Popen[bytes]
    lock: int


class RunProcesses:
    """The processes of a study that are alive.

    Each holds its run's lock for as long as it lives, also when the one that started it has been killed. So a
    run is never worked on twice, and what a killed study has left behind ends first.
    """

    def __init__(self) -> None:
        self._started: dict[str, Started] = {}

    def __len__(self) -> int:
        return len(self._started)

    @property
    def names(self) -> list[str]:
        """The runs that are worked on, in the order in which they began."""
        return list(self._started)

    def start(
        self,
        name: str,
        make_command: Callable[[], Sequence[str] | None],
        *,
        env: Mapping[str, str],
        log: Path,
        lock: Path,
    ) -> bool:
        """Start to work on a run, unless somebody does already.

        Args:
            name: of the run.
            make_command: called once nobody else can work on the run; gives the command with its arguments,
                or ``None`` if there is nothing left to do.
            env: environment of the process.
            log: where all goes that it prints, after what is there.
            lock: the run's lock.

        Returns:
            Whether it was started: not if another process holds the lock, or nothing is left to do.
        """
        for path in (log, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            return False
        command = make_command()
        if command is None:
            os.close(held)
            return False
        with log.open("ab") as output:
            output.write(f"\n{_MARK}{shlex.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[held],
                start_new_session=True,
            )
        self._started[name] = Started(process, held)
        return True

    def ended(self) -> dict[str, int]:
        """The runs whose processes have ended since the last call, with their exit codes."""
        codes: dict[str, int] = {}
        for name, started in list(self._started.items()):
            code = started.process.poll()
            if code is not None:
                os.close(started.lock)
                del self._started[name]
                codes[name] = code
        return codes

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to all; with SIGKILL also to what they have started."""
        for started in self._started.values():
            try:
                if signum == signal.SIGKILL:
                    os.killpg(started.process.pid, signum)
                else:
                    started.process.send_signal(signum)
            except ProcessLookupError:
                continue


def explain_end(code: int, log: str) -> str:
    r"""Say why a process has failed.

    Args:
        code: its exit code; negative for the signal that killed it.
        log: what it printed, after what earlier processes on the same run have printed.

    Returns:
        A sentence, from what it printed if there is any of use.

    Example:
        >>> explain_end(2, "\nmemtrain: error: no such option\n")
        'no such option'
        >>> explain_end(-9, "")
        'killed by SIGKILL, as by the system when memory runs out'
    """
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", as by the system when memory runs out" if name == "SIGKILL" else "")
    last = log.rpartition(f"\n{_MARK}")[2] if f"\n{_MARK}" in log else f"\n{log}"
    lines = [line.strip() for line in last.splitlines()[1:] if line.strip()]
    for line in reversed(lines):
        if line.startswith("memtrain: error: "):
            return line.removeprefix("memtrain: error: ")
    return lines[-1] if lines else f"exit code {code}"
