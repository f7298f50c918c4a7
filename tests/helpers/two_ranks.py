"""The same checks in two gloo processes, and what each of them found."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import multiprocessing

Check = Callable[[str, Path, int], Any]


def found_by_two_ranks(check: Check, names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Run a check for each name in both processes, where Lightning finds what it needs for two devices.

    Args:
        check: a function of a module; takes name, folder and rank, and returns what JSON can hold.
        names: of the cases.
        folder: for what the processes write.

    Returns:
        For each rank what it found by name; where the check failed, the traceback as text.
    """
    multiprocessing.spawn(_run_rank, (find_free_network_port(), folder, check, names), nprocs=2)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def _run_rank(rank: int, port: int, folder: Path, check: Check, names: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = check(name, folder, rank)
        except BaseException:
            found[name] = traceback.format_exc()
        # After each case: one that hangs does not take the others with it.
        (folder / f"rank_{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
