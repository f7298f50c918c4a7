"""One process of a study's run: ``memtrain run`` at low priority, which ends when the study ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from lightning_memtrain.cli import main

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have this process end with a checkpoint when the one that started it is gone, even if it was killed.

    Args:
        parent: id of the process that started it, which may be gone already.

    Raises:
        KeyboardInterrupt: if it is.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            raise KeyboardInterrupt


def run(argv: Sequence[str]) -> int:
    """Run ``memtrain`` as a study runs it.

    Args:
        argv: id of the study's process, how nice to be to other processes, and the command's arguments.

    Returns:
        Its exit code.
    """
    parent, niceness, *command = argv
    try:
        end_with(int(parent))
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    os.nice(max(0, int(niceness) - os.nice(0)))
    return main(command)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
