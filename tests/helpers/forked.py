"""Processes that begin with Lightning imported, which takes longer than most of what tests let them do.

One process imports it; the others are forks of that. Autograd has not run in it, which would keep its forks
from running it, and no thread has been started.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "lightning.pytorch.cli",
        "lightning_memtrain",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "wandb",
        "tests.helpers.trainers",
    ]
)


def run_forked(
    call: Callable[..., Any], *args: Any, cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Call a function in a process of its own, as if it were all of a script.

    Args:
        call: a function of a module; what it returns is given to ``sys.exit``.
        *args: its arguments.
        cwd: the folder in which it runs, and in which it looks for modules first.
        environment: all of its environment.

    Returns:
        Exit code and output, as ``subprocess.run`` gives them.
    """
    with TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("out", "err")]
        process = PROCESSES.Process(target=_run, args=(call, args, Path(cwd), environment, written))
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([*map(str, args)], 240, *(path.read_text() for path in written))
        out, err = (path.read_text() for path in written)
        return subprocess.CompletedProcess([*map(str, args)], process.exitcode, out, err)


def become(environment: dict[str, str]) -> None:
    """Take over an environment; that of a fork is as old as the process that it is a fork of."""
    os.environ.clear()
    os.environ.update(environment)


def _run(
    call: Callable[..., Any], args: Any, cwd: Path, environment: dict[str, str], written: list[Path]
) -> None:
    for number, path in enumerate(written, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    become(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    try:
        sys.exit(call(*args))
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which a process of `multiprocessing` leaves out
