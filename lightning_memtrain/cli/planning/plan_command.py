"""Find how a recipe, or a model of a file, keeps a limit of memory."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.planning.predict_command import (
    DOES_NOT_FIT,
    class_of_file,
    refuse_options_of_recipes,
)
from lightning_memtrain.cli.run import configurations
from lightning_memtrain.cli.run_folder import RunFolder
from lightning_memtrain.cli.writable import require_writable

if TYPE_CHECKING:
    from lightning_memtrain.planning import Plan


def show_plan(
    target: str,
    *,
    limit: str | None,
    device: str | None,
    allow: Sequence[str] = (),
    variants: Sequence[str] = (),
    batch_size: int | None = None,
    output: Path,
    as_json: bool = False,
    overrides: Sequence[str] = (),
) -> int:
    """Print a plan, and write it.

    Args:
        target: a recipe's name or folder, a configuration of LightningCLI, or ``file.py:Class`` for a
            LightningModule that brings its ``train_dataloader``.
        limit: as for :func:`~lightning_memtrain.plan`, as text.
        device: as for :func:`~lightning_memtrain.plan`.
        allow: likewise.
        variants: what to lay over the recipe, together.
        batch_size: samples in a batch; ``None`` for what recipe or class have.
        output: where the plan goes; its page goes beside it.
        as_json: whether to print JSON instead of the table.
        overrides: options of LightningCLI, for a recipe.

    Returns:
        The exit code of the command: 0 if there is a way, else :data:`~.predict_command.DOES_NOT_FIT`.

    Raises:
        CommandError: if something of it is wrong, or cannot be planned.
    """
    require_writable(output.parent, "the plan's folder")
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if batch_size is not None and batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, but got {batch_size}.")
    options: dict[str, Any] = {"limit": _number_or_text(limit), "device": device, "allow": allow}
    file, colon, name = target.rpartition(":")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the answer alone is printed
            if colon and file.endswith(".py"):
                refuse_options_of_recipes(variants, overrides)
                plan = _of_class(Path(file), name, batch_size, options)
            else:
                plan = _of_recipe(target, variants, batch_size, overrides, options)
    except (MisconfigurationException, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    print(json.dumps(plan.to_dict(), indent=2) if as_json else plan)
    plan.save_html(output.with_suffix(".html"))
    if not plan.fits:
        return DOES_NOT_FIT
    plan.save(output)
    print(f"Plan: {output}; page: {output.with_suffix('.html')}", file=sys.stderr)
    return 0


def _of_recipe(
    target: str,
    variants: Sequence[str],
    batch_size: int | None,
    overrides: Sequence[str],
    options: dict[str, Any],
) -> Plan:
    if target.endswith((".yaml", ".yml")):
        if variants:
            raise CommandError("--variant is for recipes, but a configuration was named; leave it out.")
        if not Path(target).is_file():
            raise CommandError(f"`{target}` is no file.", exit_code=1)
        configs = [target]
        sys.path.insert(0, "")  # as for a script that makes a LightningCLI
    else:
        recipe = recipes.find(target)
        configs = configurations(recipe, variants)
        if recipe not in recipes.installed().values():
            recipe.make_importable()

    from lightning.pytorch.cli import SaveConfigCallback

    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI
    from lightning_memtrain.planning import plan

    arguments = [*(f"--config={config}" for config in configs), *overrides]
    if batch_size is not None:
        arguments.append(f"--data.batch_size={batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        cli = RecipeCLI(RunFolder(Path(folder)), arguments)
        trainer: Any = cli.trainer
        # What saves the configuration to the run's folder: there is no run.
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, SaveConfigCallback)]
        return plan(cli.model, cli.datamodule, trainer=trainer, **options)


def _of_class(file: Path, name: str, batch_size: int | None, options: dict[str, Any]) -> Plan:
    from lightning_memtrain.planning import plan

    kind = class_of_file(file, name)
    if batch_size is None:
        return plan(kind, **options)
    if "batch_size" not in inspect.signature(kind).parameters:
        raise CommandError(
            f"--batch-size needs a class with an argument `batch_size`, but `{name}` of `{file}` has none."
        )
    return plan(lambda: kind(batch_size=batch_size), **options)


def _number_or_text(limit: str | None) -> int | float | str | None:
    if limit is None:
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(limit)
    return limit
