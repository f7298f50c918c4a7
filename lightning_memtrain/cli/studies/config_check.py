"""Finds what is wrong with a study's configurations before hours of runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_memtrain.cli.errors import CommandError, did_you_mean
from lightning_memtrain.cli.recipes import Recipe
from lightning_memtrain.cli.run import configurations
from lightning_memtrain.cli.run_folder import RunFolder


def check_class_paths(config: Any, owner: str) -> None:
    """Look up every class that a configuration names with its module.

    Args:
        config: a piece of a configuration.
        owner: who has written it, for the error.

    Raises:
        CommandError: if there is no such class, with the nearest name that there is.
    """
    for key, path in _class_paths(config):
        module_name, _, name = path.rpartition(".")
        if not module_name:
            continue  # a short name, which LightningCLI looks up
        where = f"`{key}.class_path` of {owner} names `{path}`, but"
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise CommandError(f"{where} {module_name} cannot be imported: {error}.") from error
        if not hasattr(module, name):
            known = getattr(module, "__all__", None) or [one for one in dir(module) if one[:1].isupper()]
            raise CommandError(f"{where} {module_name} has no `{name}`.{did_you_mean(name, known)}")


def check_run(recipe: Recipe, overlay: Mapping[str, Any], owner: str) -> None:
    """Make the model, the data and the Trainer of a run, and throw them away.

    Args:
        recipe: what is run.
        overlay: what is laid over it.
        owner: who has written it, for the error.

    Raises:
        CommandError: if an option or its value is wrong, or two do not go together.
    """
    from lightning_memtrain.cli.training.lightning_cli import RecipeCLI

    texts = [*configurations(recipe, []), yaml.safe_dump(dict(overlay), sort_keys=False)]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            RecipeCLI(RunFolder(Path(folder)), [f"--config={text}" for text in texts])
        except CommandError as error:
            raise CommandError(f"{owner} cannot be run: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Lightning says of a run is said when it runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _class_paths(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(config, Mapping):
        path = config.get("class_path")
        if isinstance(path, str):
            yield key, path
        for name, value in config.items():
            yield from _class_paths(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from _class_paths(value, f"{key}[{index}]")
