"""What `memtrain run --plan FILE` lays over a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_memtrain.cli.errors import CommandError


def trainer_of_plan(path: Path) -> dict[str, Any]:
    """The part of a configuration that has a run follow a plan.

    Args:
        path: a file of ``memtrain plan``.

    Returns:
        A configuration for LightningCLI: the plan's techniques, and a callback that stops another run.

    Raises:
        CommandError: if it is no plan, or has no way that keeps its limit.
    """
    from lightning_memtrain.planning import Plan
    from lightning_memtrain.planning.fit.plan_file import trainer_section

    try:
        plan = Plan.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    if plan.chosen is None or not plan.fits:
        raise CommandError(f"`{path}` is a plan that does not keep its limit; plan again with another one.")
    section = trainer_section(plan.chosen)
    lists = {f"{name}+": section.pop(name) for name in ("callbacks", "plugins") if name in section}
    guard = {
        "class_path": "lightning_memtrain.planning.fit.running.file_guard.FileGuard",
        "init_args": {"path": str(path.resolve())},
    }
    return {"trainer": {**section, **lists, "callbacks+": [*lists.get("callbacks+", ()), guard]}}
