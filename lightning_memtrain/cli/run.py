"""Start a run of a recipe, or go on with one."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.checkpoint_file import trust, trusted
from lightning_memtrain.cli.errors import INTERRUPTED, CommandError
from lightning_memtrain.cli.plan_overlay import trainer_of_plan
from lightning_memtrain.cli.recipes import Recipe
from lightning_memtrain.cli.run_folder import RunFolder, launched_by_first_process
from lightning_memtrain.cli.variants import merge_variants
from lightning_memtrain.cli.writable import require_writable

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}

if TYPE_CHECKING:
    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI


def run(
    recipe: Recipe,
    variants: Sequence[str],
    run_dir: Path | None,
    overrides: Sequence[str],
    *,
    plan: Path | None = None,
    test: bool = False,
) -> tuple[int, RunFolder]:
    """Train by a recipe, in a new folder of its own.

    Args:
        recipe: what to run.
        variants: what to lay over it, together.
        run_dir: an empty or new folder; ``None`` for one named after the recipe and the time.
        overrides: options of LightningCLI.
        plan: a file of ``memtrain plan`` to follow.
        test: whether to test what was trained, after the last step.

    Returns:
        The exit code of the command, and the run's folder.
    """
    plan_config = {} if plan is None else trainer_of_plan(plan)
    names = {name: recipe.variant(name) for name in variants}
    folder = RunFolder.new(run_dir, "-".join([recipe.name, *names]))
    configs = configurations(recipe, variants, plan_config)
    is_users_own = recipe not in recipes.installed().values()
    if is_users_own:
        recipe.make_importable()

    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI

    options = [*(f"--config={config}" for config in configs), *overrides]
    cli = RecipeCLI(folder, options, recipe=recipe.name)
    if is_users_own and not launched_by_first_process():
        folder.keep_code(recipe)
    return _fit(cli, None, test), folder


def resume(
    run_dir: Path, trusted_classes: Sequence[str], overrides: Sequence[str], *, test: bool = False
) -> tuple[int, RunFolder]:
    """Go on with a run from its last checkpoint.

    Args:
        run_dir: the run's folder.
        trusted_classes: names of classes that objects in its checkpoints may be of.
        overrides: options of LightningCLI that shall differ from now on.
        test: as for :func:`run`.

    Returns:
        The exit code of the command, and the run's folder.
    """
    folder = RunFolder.open(run_dir)
    require_writable(folder.path, "the run folder")
    require_jsonargparse()
    if not any(folder.checkpoints.glob("*.ckpt")):
        folder.last_checkpoint()  # says so before anything is made
    kept = folder.kept_recipe()
    if kept is not None:
        kept.make_importable()

    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI

    recipe = folder.recipe()
    name = "" if recipe is None else recipe.name
    cli = RecipeCLI(folder, [f"--config={folder.config}", *overrides], resumed=True, recipe=name)
    # Now that the code of the run is imported, which may say itself what checkpoints may hold.
    trust(trusted_classes)
    checkpoint, global_step = folder.last_checkpoint()
    if not launched_by_first_process():
        folder.drop_metrics_from(global_step)
    return _fit(cli, checkpoint, test), folder


def configurations(
    recipe: Recipe, variants: Sequence[str], plan: Mapping[str, Any] | None = None
) -> list[str]:
    """What LightningCLI is given of a recipe.

    Args:
        recipe: any.
        variants: what to lay over it, together.
        plan: what a plan lays over it besides.

    Returns:
        The path of the recipe's configuration, and the text of another one for after it, if there is any.

    Raises:
        CommandError: if there is no such variant, or jsonargparse is missing.
    """
    files = {name: recipe.variant(name) for name in variants}
    require_jsonargparse()
    return [str(recipe.config), *([_together(recipe.config, files, plan)] if files or plan else [])]


def _together(recipe: Path, variants: Mapping[str, Path], plan: Mapping[str, Any] | None = None) -> str:
    """The text of one configuration with what all variants and the plan set."""
    import yaml
    from jsonargparse import get_loader

    load = get_loader("yaml")  # its numbers are not all that YAML's own would take for numbers
    overlay = merge_variants(
        load(recipe.read_text(encoding="utf-8")),
        {name: load(path.read_text(encoding="utf-8")) or {} for name, path in variants.items()},
        plan or {},
    )
    if not launched_by_first_process():
        for remark in overlay.remarks:
            print(f"memtrain: {remark}", file=sys.stderr)
    return yaml.safe_dump(overlay.config, sort_keys=False)


def _fit(cli: RecipeCLI, checkpoint: Path | None, test: bool) -> int:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        with cli.interrupt.listening(cli.trainer), trusted(), warnings.catch_warnings():
            if checkpoint is not None:
                warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)
            if test:
                cli.trainer.test(cli.model, cli.datamodule)
        if cli.record is not None:
            cli.record.finish(cli.trainer)
    except SystemExit as error:
        # What Lightning makes of an interrupt.
        if type(error) is not SystemExit or not cli.trainer.interrupted:
            raise
        _say_how_to_go_on(cli)
        return cli.interrupt.exit_code or INTERRUPTED
    except MisconfigurationException as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise CommandError(
                f"there is no room left to write `{error.filename or cli.folder.path}` ({error.strerror}). "
                f"What was whole is left as it was; go on with: memtrain run --resume {cli.folder.path}",
                exit_code=1,
            ) from error
        if isinstance(error, OSError) and _is_within(error.filename, cli.folder.path):
            raise CommandError(
                f"`{error.filename}` of the run cannot be written or read: {error.strerror}.", exit_code=1
            ) from error
        if not _comes_from_data(error, cli.datamodule):
            raise
        raise CommandError(str(error), exit_code=1) from error
    return cli.interrupt.exit_code


def _is_within(name: object, folder: Path) -> bool:
    return isinstance(name, str) and folder.absolute() in Path(name).absolute().parents


def _say_how_to_go_on(cli: RecipeCLI) -> None:
    if not cli.trainer.is_global_zero:
        return
    if cli.interrupt.saved:
        steps = cli.trainer.global_step
        message = f"stopped after {steps} steps; go on with: memtrain run --resume {cli.folder.path}"
    else:
        message = f"stopped at once, without a checkpoint; earlier ones are in {cli.folder.checkpoints}"
    print(f"memtrain: {message}", file=sys.stderr)


def _comes_from_data(error: BaseException, datamodule: object) -> bool:
    """Whether the data module raised it when it got or read its data: files are wrong then, and not code."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name in ("prepare_data", "setup") and trace.tb_frame.f_locals.get("self") is datamodule:
            return True
        trace = trace.tb_next
    return False


def require_jsonargparse() -> None:
    """Refuse to go on without what LightningCLI needs.

    Raises:
        CommandError: if it is missing.
    """
    for package in ("jsonargparse", "docstring_parser"):
        if find_spec(package) is None:
            raise CommandError(
                f"running a recipe needs {package}, which is not installed. "
                "Install it: pip install 'lightning-memtrain[cli]'"
            )
