"""The options of ``memtrain study`` and ``memtrain compare``, known without importing what they need."""

from __future__ import annotations

import argparse
from pathlib import Path

SWEEP_NAME = "sweep.yaml"


def add_study_options(options: argparse.ArgumentParser) -> None:
    """Declare the options of ``memtrain study``, beside the recipe.

    Args:
        options: its parser.
    """
    add = options.add_argument
    add("--grid", metavar="FILE|NAME", help="what to run; default: the recipe's own grid `default`")
    add("--seeds", metavar="N", help="runs of each variant: a number, or seeds such as 1,2,5")
    add("--jobs", metavar="N", default="2", help="runs at a time (default: 2)")
    add("--threads", metavar="N", default="1", help="threads of each run (default: 1)")
    add("--nice", metavar="N", default="10", help="priority of runs, from 0 (usual) to 19 (default: 10)")
    add("--resume", action="store_true", help="go on with the study in the folder")
    add("--study-dir", type=Path, metavar="DIR", help="default: studies/RECIPE-GRID")
    add("--variant", metavar="NAME", action="append", default=[], help="only this variant; several add up")
    add("--seed", type=int, metavar="N", action="append", default=[], help="only this seed; several add up")
    add("--run", metavar="NAME", action="append", default=[], help="only this run; several add up")
    add(
        "--wandb",
        choices=("off", "offline", "online"),
        help="default: offline if wandb is installed, else off",
    )
    add("--wandb-project", metavar="NAME", default="memtrain", help="default: memtrain")
    add("--wandb-sweep", action="store_true", help=f"run nothing, and write {SWEEP_NAME} for `wandb sweep`")


def add_compare_options(options: argparse.ArgumentParser) -> None:
    """Declare the options of ``memtrain compare``.

    Args:
        options: its parser.
    """
    run = "the folder of a run, or its memory_report.json"
    options.add_argument("runs", metavar="RUN", nargs="+", type=Path, help=run)
    options.add_argument("--stage", metavar="NAME", help="fit (default), validate, test or predict")
    options.add_argument("--json", action="store_true", help="print JSON, see docs/study.md")
    options.add_argument("--page", type=Path, metavar="FILE", help="write a page, too")
