"""The same checks in two gloo processes, and what each of them found."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.helpers.forked import PROCESSES, become

Check = Callable[[str, Path, int], Any]


class TwoRanks:
    """Two processes where Lightning finds what it needs for two devices.

    A case runs when it is first asked for, so that each test takes the time of its own. The processes begin
    with the first case, which takes half a second, and end with the block.

    Args:
        check: a function of a module; takes the name of a case, a folder and the rank, and returns what JSON
            can hold.
        folder: for what the processes write.
    """

    def __init__(self, check: Check, folder: Path) -> None:
        self._check = check
        self.folder = folder
        """Where they write, what they print among it (``rank_0.log``, ``rank_1.log``)."""
        self._found: dict[str, list[Any]] = {}
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, name: str) -> list[Any]:
        """What each rank found in a case; where the check failed, the traceback as text."""
        if name not in self._found:
            if not self._processes:
                self._start()
            try:
                for pipe in self._pipes:
                    pipe.send(name)
                self._found[name] = [json.loads(pipe.recv()) for pipe in self._pipes]
            except BaseException:  # a rank that has died or hangs; the next case gets others
                self._stop()
                raise
        return self._found[name]

    def __enter__(self) -> TwoRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
        self._stop()

    def _start(self) -> None:
        variables = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_network_port()),
            "WORLD_SIZE": "2",
            "NODE_RANK": "0",
        }
        for rank in range(2):
            ours, theirs = PROCESSES.Pipe()
            arguments = theirs, self._check, self.folder, rank, {**variables, "LOCAL_RANK": str(rank)}
            process = PROCESSES.Process(target=_run_rank, args=arguments)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _run_rank(cases: Connection, check: Check, folder: Path, rank: int, environment: dict[str, str]) -> None:
    warnings.simplefilter("ignore")
    become(environment)
    with (folder / f"rank_{rank}.log").open("w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    torch.set_num_threads(1)
    while True:
        try:
            name = cases.recv()
        except EOFError:
            break
        try:
            found = check(name, folder, rank)
        except BaseException:
            found = traceback.format_exc()
        cases.send(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
