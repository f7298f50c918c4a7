"""LightningCLI, put into a run's folder."""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_memtrain
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.run_folder import RunFolder
from lightning_memtrain.cli.training.argument_errors import shorten_error
from lightning_memtrain.cli.training.atomic_checkpoint import use_atomic_checkpoints
from lightning_memtrain.cli.training.csv_logger import RunCSVLogger
from lightning_memtrain.cli.training.interrupt import StopOnInterrupt
from lightning_memtrain.cli.training.random_state_callback import RandomState
from lightning_memtrain.cli.training.run_record_callback import RecordRun


class RecipeCLI(LightningCLI):
    """Builds the model, the data and the Trainer of a run, and runs nothing yet.

    Args:
        folder: where all that the run writes goes.
        args: options of LightningCLI, ``--config`` among them.
        resumed: whether the folder holds the earlier part of the run.
        recipe: the recipe's name, for the run's record; ``None`` for what will not be run.

    Raises:
        CommandError: if an option or its value is wrong.
    """

    def __init__(
        self, folder: RunFolder, args: Sequence[str], *, resumed: bool = False, recipe: str | None = None
    ) -> None:
        self.folder = folder
        self.record: RecordRun | None = None
        self._recipe = recipe
        self.interrupt = StopOnInterrupt(folder.interrupt_checkpoint)
        try:
            super().__init__(
                args=list(args),
                run=False,
                save_config_kwargs={"overwrite": resumed},
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            )
        except (argparse.ArgumentError, ValueError, MisconfigurationException) as error:
            # The latter two when classes are made, which refuse wrong arguments and say what to do.
            raise CommandError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        options = (option for action in self.parser._actions for option in action.option_strings)
        own = (
            importlib.import_module(f"lightning_memtrain.{one}") for one in lightning_memtrain._SUBPACKAGES
        )
        classes = [name for module in own for name in module.__all__ if name[:1].isupper()]
        class_names = [*callbacks.__all__, *loggers.__all__, *classes, *_data_modules()]
        return shorten_error(str(error), options, class_names)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was passed, without Lightning's warning that ``sys.argv`` has arguments, too."""
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError:
            # Not earlier: the classes that have short names are imported when the configuration is read, and
            # those of this library, which takes a second, only if a run needs more than its file names.
            spelled_out = spell_out_data(args, _data_modules())
            if not import_own_classes() and spelled_out == args:
                raise
            self.config = parser.parse_args(spelled_out)

    def instantiate_classes(self) -> None:
        """Make the model and the data, and then the Trainer, whose files all go into the run's folder.

        Raises:
            CommandError: if files are to go elsewhere.
        """
        if self.config.trainer.default_root_dir is not None:
            raise CommandError("`--trainer.default_root_dir` is the run folder; set it with --run-dir.")
        self._asked = self.config
        # Only what is made from it changes: the saved configuration must not name this folder, so that the
        # folder can be moved before it is resumed.
        self.config = self.config.clone()
        for logger in _configured_loggers(self.config.trainer.logger):
            if logger.class_path.endswith("WandbLogger"):
                _place_wandb(logger, self.folder)
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer with what every run has: metrics, random state, and an end by Ctrl-C."""
        self.config = self._asked
        trainer = self.config_init.trainer
        added: list[pl.Callback] = [RandomState()]
        if self._recipe is not None:
            self.record = RecordRun(self.folder.path, self._recipe, _seed(self._asked.get("seed_everything")))
            added.append(self.record)
        if trainer.enable_checkpointing is not False:
            added += [*_default_checkpoint(trainer.callbacks), self.interrupt]
        self.trainer_defaults = {"callbacks": added}
        logger = trainer.logger
        if logger is not False:
            given = logger if isinstance(logger, list) else [] if logger in (None, True) else [logger]
            logger = [RunCSVLogger(self.folder.path), *given]
        made = super().instantiate_trainer(default_root_dir=str(self.folder.path), logger=logger, **kwargs)
        use_atomic_checkpoints(made)
        return made


def import_own_classes() -> bool:
    """Import all classes of this library: of a class that is imported, the name alone is enough.

    Returns:
        Whether that was not done before.
    """
    if _imported:
        return False
    for name in (*lightning_memtrain._SUBPACKAGES, "checkpointing.experimental"):
        module = importlib.import_module(f"lightning_memtrain.{name}")
        _imported.extend(getattr(module, one) for one in module.__all__)
    return True


# All of it, once it is there.
_imported: list[Any] = []


def spell_out_data(args: Sequence[str], data_modules: Mapping[str, str]) -> list[str]:
    """Put the name of its class in the place of a data module's short name.

    Args:
        args: options of LightningCLI.
        data_modules: names of classes by their short names, which are in lower case.

    Returns:
        The options, with the value of ``--data`` replaced where it is one of the short names, in any case.

    Example:
        >>> spell_out_data(["--data", "Digits", "--seed=1"], {"digits": "DigitsDataModule"})
        ['--data', 'DigitsDataModule', '--seed=1']
    """
    spelled_out = list(args)
    for index, (before, arg) in enumerate(itertools.pairwise(["", *args])):
        option = "--data=" if arg.startswith("--data=") else ""
        value = arg.removeprefix(option)
        if option or before == "--data":
            spelled_out[index] = option + data_modules.get(value.lower(), value)
    return spelled_out


def _data_modules() -> dict[str, str]:
    """The data modules that were imported, by what is left of their names without `DataModule`."""

    def below(base: type[pl.LightningDataModule]) -> Iterator[str]:
        for subclass in base.__subclasses__():
            yield subclass.__name__
            yield from below(subclass)

    return {name.removesuffix("DataModule").lower(): name for name in below(pl.LightningDataModule)}


def _default_checkpoint(configured: Any) -> list[callbacks.Checkpoint]:
    # Lightning adds its own only where there is no other, and ours for Ctrl-C would count as one.
    configured = configured if isinstance(configured, list) else [configured]
    if any(isinstance(callback, callbacks.Checkpoint) for callback in configured):
        return []
    return [callbacks.ModelCheckpoint()]


def _configured_loggers(configured: Any) -> list[Any]:
    given = configured if isinstance(configured, list) else [configured]
    return [logger for logger in given if hasattr(logger, "class_path")]


def _seed(configured: Any) -> int | None:
    return configured if isinstance(configured, int) and not isinstance(configured, bool) else None


def _place_wandb(logger: Any, folder: RunFolder) -> None:
    from importlib.util import find_spec

    if find_spec("wandb") is None:
        raise CommandError(
            "this run logs to W&B, but wandb is not installed: pip install 'lightning-memtrain[wandb]'"
        )
    if logger.init_args.get("save_dir") in (None, "."):
        logger.init_args.save_dir = str(folder.path)
