"""``memtrain demo``: the whole of it in a few minutes on a CPU, without network and without questions."""

from __future__ import annotations

import contextlib
import io
import os
from importlib.util import find_spec
from pathlib import Path

from lightning_memtrain.cli.planning.plan_command import show_plan
from lightning_memtrain.cli.recipes import find
from lightning_memtrain.cli.run import run

# Techniques are added in the recipe's variants/demo.yaml; W&B is optional, so it is added here.
RECIPE, VARIANT = "cifar10_wrn28_2", "demo"
_WANDB = [
    "--trainer.logger+=WandbLogger",
    "--trainer.logger.project=memtrain",
    "--trainer.logger.offline=true",
]
# For a GPU, whose nominal speeds make a plan the same on every run.
_LINES = 12
_LIMIT, _DEVICE = "760MiB", "RTX 3060"
_PLAN_OVERRIDES = [
    "--data.class_path=lightning_memtrain.recipes.cifar10_wrn28_2.data.DigitsDataModule",
    "--data.num_val_images=200",
]


def run_demo(run_dir: Path | None, overrides: list[str]) -> int:
    """Train the demo and say where its results are.

    Args:
        run_dir: as for ``memtrain run``.
        overrides: options of LightningCLI.

    Returns:
        The exit code of the command.
    """
    # The memory table is to be the last that is printed, without W&B's history before it, or torch's remark
    # that its profiler has not seen the first allocations.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    has_wandb = find_spec("wandb") is not None
    exit_code, folder = run(find(RECIPE), [VARIANT], run_dir, [*(_WANDB if has_wandb else []), *overrides])
    if has_wandb:
        import wandb

        wandb.finish()  # completes its file
        offline = " ".join(str(path) for path in sorted(folder.path.glob("wandb/offline-run-*")))
    else:
        offline = "none, as wandb is not installed (pip install 'lightning-memtrain[wandb]')"
    print_plan(folder.path)
    print(f"Memory report: {folder.path / 'memory' / 'memory_report.html'}")
    print(f"W&B offline run: {offline}")
    return exit_code


def print_plan(folder: Path) -> None:
    """Say how the demo's network would keep to little of a GPU.

    Args:
        folder: gets the plan and its page.
    """
    plan = folder / "plan.yaml"
    table = io.StringIO()
    with contextlib.redirect_stdout(table), contextlib.redirect_stderr(io.StringIO()):
        show_plan(RECIPE, limit=_LIMIT, device=_DEVICE, output=plan, overrides=_PLAN_OVERRIDES)
    print(f'\n$ memtrain plan {RECIPE} --limit {_LIMIT} --device "{_DEVICE}"\n')
    print(_beginning(table.getvalue()))
    print(f"\nPlan: {plan.with_suffix('.html')}")


def _beginning(table: str) -> str:
    """What is said of the way to take; the other ways are in the page."""
    lines = table.splitlines()
    return "\n".join(lines[:_LINES] + (["    ..."] if len(lines) > _LINES else []))
