"""A study as a sweep of Weights & Biases, so that several machines share its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_memtrain.study.grid import Grid
from lightning_memtrain.study.study_plan import StudyPlan


def sweep_config(plan: StudyPlan, grid: Grid, command: Sequence[str], project: str) -> dict[str, Any]:
    """Make what ``wandb sweep`` takes.

    Args:
        plan: all runs, of which each is one of the sweep.
        grid: what it was made from.
        command: of a study that has only one run to do, without the option that says which.
        project: of W&B.

    Returns:
        The configuration of a sweep.
    """
    sweep: dict[str, Any] = {
        "name": f"{plan.recipe} study",
        "project": project,
        "method": "grid",
        "parameters": {"run": {"values": [run.name for run in plan.runs]}},
        "command": ["${env}", *command, "${args}"],
    }
    if grid.score is not None:
        goal = "maximize" if grid.score.mode == "max" else "minimize"
        sweep["metric"] = {"name": grid.score.metric, "goal": goal}
    return sweep
