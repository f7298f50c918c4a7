"""A study as a sweep of Weights & Biases, so that several machines share its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_memtrain.study.grid import Grid
from lightning_memtrain.study.study_plan import StudyPlan


def sweep_config(plan: StudyPlan, grid: Grid, command: Sequence[str], project: str) -> dict[str, Any]:
    """Make what ``wandb sweep`` takes.

    Args:
        plan: all runs. A sweep is all variants times all seeds, so that variants must not have seeds of their
            own.
        grid: what it was made from.
        command: of a study that has only one run to do, without the options that say which.
        project: of W&B.

    Returns:
        The configuration of a sweep.

    Raises:
        ValueError: if a variant has seeds of its own.
    """
    own = [variant.name for variant in grid.variants if variant.seeds not in (None, grid.seeds)]
    if own:
        raise ValueError(
            f"`--wandb-sweep` runs every variant with every seed, but `{own[0]}` has seeds of its own. Leave "
            "its `seeds` out, or write a grid with this variant alone."
        )
    parameters: dict[str, Any] = {
        "variant": {"values": list(dict.fromkeys(run.variant for run in plan.runs))},
        "seed": {"values": list(dict.fromkeys(run.seed for run in plan.runs))},
    }
    sweep: dict[str, Any] = {
        "name": f"{plan.recipe} study",
        "project": project,
        "method": "grid",
        "parameters": parameters,
        "command": ["${env}", *command, "${args}"],
    }
    if grid.score is not None:
        goal = "maximize" if grid.score.mode == "max" else "minimize"
        sweep["metric"] = {"name": grid.score.metric, "goal": goal}
    return sweep
