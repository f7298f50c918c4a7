"""Predict what a recipe, or a model of a file, will need on a GPU or a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import CommandError, did_you_mean
from lightning_memtrain.cli.recipes import Recipe
from lightning_memtrain.cli.run import configurations, require_jsonargparse
from lightning_memtrain.cli.run_folder import RunFolder
from lightning_memtrain.tracing.device import Device

if TYPE_CHECKING:
    from lightning_memtrain.planning import Prediction

#: Exit code of a prediction that it does not fit.
DOES_NOT_FIT = 3


def show_prediction(
    target: str,
    *,
    device: str | None,
    variants: Sequence[str] = (),
    batch_size: int | None = None,
    world_size: int | None = None,
    strategy: str | None = None,
    as_json: bool = False,
    overrides: Sequence[str] = (),
) -> int:
    """Print a prediction.

    Args:
        target: a recipe's name or folder, the file of a LightningCLI configuration, or ``file.py:Class`` for
            a LightningModule that brings its ``train_dataloader``.
        device: what ``memtrain devices`` lists, or ``"cpu"``; ``None`` for this machine's GPU, or its memory
            if it has none.
        variants: what to lay over the recipe, together.
        batch_size: samples in a batch; ``None`` for what recipe or class have.
        world_size: how many ranks the run has; ``None`` for one, or what the recipe has.
        strategy: what they exchange, as :func:`~lightning_memtrain.planning.predict` takes it.
        as_json: whether to print JSON instead of a table.
        overrides: options of LightningCLI, for a recipe.

    Returns:
        The exit code of the command: 0 if it fits, else :data:`DOES_NOT_FIT`.

    Raises:
        CommandError: if something of it is wrong, or cannot be predicted.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if batch_size is not None and batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, but got {batch_size}.")
    file, colon, name = target.rpartition(":")
    ranks = {"world_size": world_size, "strategy": strategy}
    try:
        gpu = Device.here() if device is None else Device.named(device)  # before anything slow
        with contextlib.redirect_stdout(io.StringIO()):  # the answer alone is printed
            if colon and file.endswith(".py"):
                refuse_options_of_recipes(variants, overrides)
                _refuse_half_a_world(world_size, strategy)
                prediction = _of_class(Path(file), name, batch_size, gpu, ranks)
            elif target.endswith((".yaml", ".yml")):
                configs = _configuration(Path(target), variants)
                prediction = _of_configurations(configs, batch_size, overrides, gpu, ranks)
            else:
                prediction = _of_recipe(recipes.find(target), variants, batch_size, overrides, gpu, ranks)
    except (MisconfigurationException, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    print(json.dumps(prediction.to_dict(), indent=2) if as_json else prediction)
    return 0 if prediction.fits else DOES_NOT_FIT


def _of_recipe(
    recipe: Recipe,
    variants: Sequence[str],
    batch_size: int | None,
    overrides: Sequence[str],
    device: Device,
    ranks: dict[str, Any],
) -> Prediction:
    configs = configurations(recipe, variants)
    if recipe not in recipes.installed().values():
        recipe.make_importable()
    return _of_configurations(configs, batch_size, overrides, device, ranks)


def _configuration(file: Path, variants: Sequence[str]) -> list[str]:
    """A configuration of LightningCLI, whose classes are found as in `python -m` there."""
    if not file.is_file():
        raise CommandError(f"`{file}` is no file; name a configuration of LightningCLI.", exit_code=1)
    if variants:
        raise CommandError("`--variant` is for recipes, but a configuration was named; leave it out.")
    require_jsonargparse()
    for folder in (Path.cwd(), file.resolve().parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return [str(file)]


def _of_configurations(
    configs: Sequence[str],
    batch_size: int | None,
    overrides: Sequence[str],
    device: Device,
    ranks: dict[str, Any],
) -> Prediction:
    from lightning.pytorch.cli import SaveConfigCallback

    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI
    from lightning_memtrain.planning import predict

    options = [*(f"--config={config}" for config in configs), *overrides]
    if batch_size is not None:
        options.append(f"--data.batch_size={batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        cli = RecipeCLI(RunFolder(Path(folder)), options)
        trainer: Any = cli.trainer
        # What saves the configuration to the run's folder: there is no run.
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, SaveConfigCallback)]
        return predict(cli.model, datamodule=cli.datamodule, trainer=trainer, device=device, **ranks)


def _of_class(
    file: Path, name: str, batch_size: int | None, device: Device, ranks: dict[str, Any]
) -> Prediction:
    from lightning_memtrain.planning import predict

    kind = class_of_file(file, name)
    if batch_size is None:
        return predict(kind, device=device, **ranks)
    if "batch_size" not in inspect.signature(kind).parameters:
        raise CommandError(
            f"--batch-size needs a class with an argument `batch_size`, but `{name}` of `{file}` has none."
        )

    class OfSize(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(batch_size=batch_size)

    OfSize.__name__ = name
    return predict(OfSize, device=device, **ranks)


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


def refuse_options_of_recipes(variants: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse what only a recipe has, where a class of a file was named.

    Args:
        variants: names of variants.
        overrides: options of LightningCLI.

    Raises:
        CommandError: if there is any.
    """
    if variants or overrides:
        given = "--variant" if variants else overrides[0]
        raise CommandError(f"`{given}` is for recipes, but a class of a file was named; leave it out.")


def _refuse_half_a_world(world_size: int | None, strategy: str | None) -> None:
    """A class of a file has no trainer that could say the other half."""
    if world_size is not None and strategy is None:
        raise CommandError(f"`--devices {world_size}` needs `--strategy`: add `--strategy ddp` or `fsdp2`.")
    if strategy is not None and world_size is None:
        raise CommandError(f"`--strategy {strategy}` needs the number of devices: add `--devices 8`.")
