"""Recipes: folders with a ``config.yaml``, installed with the package or copied from it."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.resources
import importlib.util
import itertools
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from lightning_memtrain.cli.errors import CommandError, did_you_mean

CONFIG = "config.yaml"
PACKAGE = "lightning_memtrain.recipes"


class RecipeCommand(Protocol):
    """A module that makes a command of ``memtrain`` for what was trained by a recipe."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options, beside the run's folder."""

    def run(self, folder: Path, options: argparse.Namespace) -> int:
        """Do it.

        Args:
            folder: of the run.
            options: those that were declared.

        Returns:
            The exit code of the command.
        """


@dataclass(frozen=True)
class Recipe:
    """A folder with the configuration of a training run, and code that only this run needs.

    ``config.yaml`` is a configuration of LightningCLI; each ``variants/NAME.yaml`` is laid over it. The
    comment at the top of either says what it is. Each ``commands/NAME.py`` is a :class:`RecipeCommand`, and
    its docstring says what it does.

    Args:
        name: how it is called on the command line.
        folder: where it lies.
    """

    name: str
    folder: Path

    @property
    def config(self) -> Path:
        """The whole recipe."""
        return self.folder / CONFIG

    @property
    def variants(self) -> dict[str, Path]:
        """What can be laid over the recipe, by name."""
        return {path.stem: path for path in sorted((self.folder / "variants").glob("*.yaml"))}

    def variant(self, name: str) -> Path:
        """The file of one variant.

        Args:
            name: one of :attr:`variants`.

        Returns:
            Its path.

        Raises:
            CommandError: if there is no such variant.
        """
        variants = self.variants
        if name not in variants:
            known = f"it has {', '.join(variants)}" if variants else "it has none"
            raise CommandError(
                f"unknown variant `{name}` of recipe `{self.name}`: {known}.{did_you_mean(name, variants)}"
            )
        return variants[name]

    @property
    def commands(self) -> dict[str, str]:
        """What each command does that can be given a run of this recipe, by name."""
        files = sorted(self.folder.glob("commands/[a-z]*.py"))
        # Read and not imported, so that listing them need not wait for torch.
        docs = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
        return {name: (doc or "").split("\n")[0].rstrip(".") for name, doc in docs.items()}

    def command(self, name: str) -> RecipeCommand:
        """Import a command.

        Args:
            name: one of :attr:`commands`.

        Returns:
            Its module.
        """
        return cast(RecipeCommand, importlib.import_module(f"{self.package}.commands.{name}"))

    @property
    def package(self) -> str:
        """The name by which the code is imported: that of the recipe it was copied from, or the folder's."""
        original = package_in(self.config)
        return f"{PACKAGE}.{original}" if original else self.folder.name

    def copy_to(self, target: Path, *, force: bool = False) -> None:
        """Copy the folder, to be changed and run.

        Args:
            target: the new folder.
            force: whether files that are there may be overwritten.

        Raises:
            CommandError: if ``target`` exists and ``force`` is not set, or is no folder.
        """
        if target.exists() and not target.is_dir():
            raise CommandError(f"`{target}` is a file; name a folder to copy the recipe to.")
        if target.exists() and any(target.iterdir()) and not force:
            raise CommandError(
                f"`{target}` is not empty; name another folder, or overwrite its files with --force."
            )
        shutil.copytree(
            self.folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"), dirs_exist_ok=True
        )

    def make_importable(self) -> None:
        """Have the classes that ``config.yaml`` names come from this folder.

        A copy keeps the import names of the recipe it was copied from, so that it can be renamed and moved;
        its modules take the place of the installed ones in this process. A folder with a package of its own
        is imported by the folder's name.
        """
        if str(self.folder.parent) not in sys.path:
            sys.path.insert(0, str(self.folder.parent))
        config = self.config.read_text(encoding="utf-8")
        name = self.package
        if name.startswith(PACKAGE) and (self.folder / "__init__.py").is_file():
            _import_as(name, self.folder)
        for module in dict.fromkeys(re.findall(rf"\b({re.escape(name)}\.[\w.]+)\.\w+", config)):
            # Here, where a mistake in them shows its traceback; jsonargparse would leave that out.
            importlib.import_module(module)


def _import_as(name: str, folder: Path) -> None:
    """Import a folder as the package ``name``, in the place of an installed one."""
    init, places = folder / "__init__.py", [str(folder)]
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
        del sys.modules[loaded]
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    setattr(importlib.import_module(parent), child, module)
    spec.loader.exec_module(module)


def describe(path: Path) -> str:
    """What a YAML file says about itself.

    Args:
        path: a recipe's configuration or a variant.

    Returns:
        The first sentence of the comment that it begins with, or nothing if it begins with none.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(
        line.lstrip("# ").rstrip() for line in itertools.takewhile(lambda line: line[:1] == "#", lines)
    )
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def package_in(config: Path) -> str | None:
    """Which of the recipes that come with the package a configuration takes its classes from.

    Args:
        config: a recipe's ``config.yaml``, or a run's.

    Returns:
        The recipe's name, or ``None`` if it is none of them.
    """
    found = re.search(rf"\b{re.escape(PACKAGE)}\.(\w+)\.", config.read_text(encoding="utf-8"))
    return found[1] if found else None


def installed() -> dict[str, Recipe]:
    """The recipes that come with the package, by name."""
    folder = Path(str(importlib.resources.files(PACKAGE)))
    return {
        path.parent.name: Recipe(path.parent.name, path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))
    }


def find(name_or_folder: str) -> Recipe:
    """Look up a recipe.

    Args:
        name_or_folder: the name of an installed recipe, or the path of a recipe's folder.

    Returns:
        The recipe.

    Raises:
        CommandError: if there is none.
    """
    recipes = installed()
    if name_or_folder in recipes:
        return recipes[name_or_folder]
    folder = Path(name_or_folder)
    if (folder / CONFIG).is_file():
        folder = folder.resolve()
        return Recipe(folder.name, folder)
    if folder.is_dir():
        raise CommandError(f"the folder `{name_or_folder}` is no recipe: it has no `{CONFIG}`.")
    raise CommandError(
        f"unknown recipe `{name_or_folder}`.{did_you_mean(name_or_folder, recipes)} "
        "`memtrain recipes` lists all; a folder with a recipe works too."
    )
