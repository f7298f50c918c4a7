"""What commands that are no runs are asked about: a recipe, a configuration, or a class of a file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import CommandError, did_you_mean
from lightning_memtrain.cli.run import configurations, require_jsonargparse
from lightning_memtrain.cli.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI


def split_class(target: str, variants: Sequence[str], overrides: Sequence[str]) -> tuple[Path, str] | None:
    """File and class of ``file.py:Class``.

    Args:
        target: what was named.
        variants: names of variants, which only a recipe has.
        overrides: options of LightningCLI, which a class of a file does not have either.

    Returns:
        Both; ``None`` for a recipe or a configuration.

    Raises:
        CommandError: if a class was named, and options that it cannot have.
    """
    file, colon, name = target.rpartition(":")
    if not (colon and file.endswith(".py")):
        return None
    if variants or overrides:
        given = "--variant" if variants else overrides[0]
        raise CommandError(f"`{given}` is for recipes, but a class of a file was named; leave it out.")
    return Path(file), name


def refuse_small_batch(batch_size: int | None) -> None:
    """Refuse a batch without samples.

    Args:
        batch_size: what was asked for; ``None`` for nothing.

    Raises:
        CommandError: if it is less than 1.
    """
    if batch_size is not None and batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, but got {batch_size}.")


def class_of_file(file: Path, name: str) -> Callable[..., Any]:
    """Import a LightningModule of a file.

    Args:
        file: of Python.
        name: of the class.

    Returns:
        The class.

    Raises:
        CommandError: if there is no such file, or no such class in it.
    """
    import lightning.pytorch as pl

    from lightning_memtrain.compat.lightning_packages import in_both

    if not file.is_file():
        raise CommandError(f"`{file}` is no file; name one as in `file.py:Class`.", exit_code=1)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, "a file that ends with .py has a loader"
    assert spec.loader is not None, "a file that ends with .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.resolve().parent))
    spec.loader.exec_module(module)
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, in_both(pl.LightningModule))):
        known = [
            key
            for key, one in vars(module).items()
            if isinstance(one, type) and issubclass(one, in_both(pl.LightningModule))
        ]
        raise CommandError(
            f"`{file}` must have a LightningModule of the name `{name}`, but has "
            f"{', '.join(known) or 'none'}.{did_you_mean(name, known)}",
            exit_code=1,
        )
    return kind


def refuse_fixed_batch_size(kind: Callable[..., Any], file: Path, name: str) -> None:
    """Refuse a class that cannot be told how many samples its batches have.

    Args:
        kind: the class.
        file: where it is.
        name: its name.

    Raises:
        CommandError: if it has no argument ``batch_size``.
    """
    if "batch_size" not in inspect.signature(kind).parameters:
        raise CommandError(
            f"--batch-size needs a class with an argument `batch_size`, but `{name}` of `{file}` has none."
        )


def configurations_of(target: str, variants: Sequence[str]) -> list[str]:
    """Configurations of a recipe, or the one that was named; their classes can be imported afterwards.

    Args:
        target: a recipe's name or folder, or a configuration of LightningCLI.
        variants: what to lay over the recipe, together.

    Returns:
        Files, or texts of YAML.

    Raises:
        CommandError: if there is no such file, or if it is to have variants.
    """
    if not target.endswith((".yaml", ".yml")):
        recipe = recipes.find(target)
        configs = configurations(recipe, variants)
        if recipe not in recipes.installed().values():
            recipe.make_importable()
        return configs
    file = Path(target)
    if not file.is_file():
        raise CommandError(f"`{file}` is no file; name a configuration of LightningCLI.", exit_code=1)
    if variants:
        raise CommandError("`--variant` is for recipes, but a configuration was named; leave it out.")
    require_jsonargparse()
    # As in `python -m` there, or beside the file.
    for folder in (Path.cwd(), file.resolve().parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return [target]


@contextmanager
def assembled(
    configs: Sequence[str], batch_size: int | None, overrides: Sequence[str]
) -> Iterator[tuple[RecipeCLI, Any]]:
    """Model, data and trainer of configurations, with nothing kept on disk.

    Args:
        configs: of :func:`configurations_of`.
        batch_size: samples in a batch; ``None`` for what they have.
        overrides: options of LightningCLI.

    Yields:
        What LightningCLI has made, and its trainer.
    """
    from lightning.pytorch.cli import SaveConfigCallback

    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI

    options = [*(f"--config={config}" for config in configs), *overrides]
    if batch_size is not None:
        options.append(f"--data.batch_size={batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        cli = RecipeCLI(RunFolder(Path(folder)), options)
        trainer: Any = cli.trainer
        # What saves the configuration to the run's folder: there is no run.
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, SaveConfigCallback)]
        yield cli, trainer
