"""Recipes: folders with a ``config.yaml``, installed with the package or copied from it."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.resources
import importlib.util
import itertools
import keyword
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from lightning_memtrain.cli.errors import CommandError, did_you_mean
from lightning_memtrain.cli.writable import require_writable

CONFIG = "config.yaml"
PACKAGE = "lightning_memtrain.recipes"


class RecipeCommand(Protocol):
    """A module that makes a command of ``memtrain`` for what was trained by a recipe."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options, beside the run's folder."""

    def run(self, folder: Path, options: argparse.Namespace) -> int:
        """Do what the command is there for.

        Args:
            folder: of the run.
            options: those that were declared.

        Returns:
            The exit code of the command.
        """


@dataclass(frozen=True)
class Recipe:
    """A folder with the configuration of a training run, and code that only this run needs.

    ``config.yaml`` is a configuration of LightningCLI; each ``variants/NAME.yaml`` is laid over it, and
    several add up. The comment at the top of either says what it is. Each ``commands/NAME.py`` is a
    :class:`RecipeCommand`, and its docstring says what it does.

    Args:
        name: how it is called on the command line.
        folder: where it lies.
    """

    name: str
    folder: Path

    @property
    def config(self) -> Path:
        """The file that describes the whole recipe."""
        return self.folder / CONFIG

    @property
    def variants(self) -> dict[str, Path]:
        """What can be laid over the recipe, by name."""
        return {path.stem: path for path in sorted((self.folder / "variants").glob("*.yaml"))}

    def variant(self, name: str) -> Path:
        """The file that one variant of the recipe lays over it.

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
        """Import a command that the recipe brings along.

        Args:
            name: one of :attr:`commands`.

        Returns:
            Its module.
        """
        return cast(RecipeCommand, importlib.import_module(f"{self.package}.commands.{name}"))

    @property
    def package(self) -> str:
        """The name by which the code is imported: the one in ``config.yaml`` for what lies in the folder.

        The folder may have been renamed since. Where nothing in it is named, its own name.
        """
        for path in _named_classes(self.config.read_text(encoding="utf-8")):
            package, _, _ = path.partition(".")
            if path.startswith(f"{PACKAGE}."):
                package = ".".join(path.split(".")[:3])
            if self._holds(path.removeprefix(f"{package}.")):
                return package
        return self.folder.name

    def _holds(self, path: str) -> bool:
        """Whether ``module.name``, seen from the folder, is something in one of its modules."""
        module = self.folder.joinpath(*path.split(".")[:-1])
        return module != self.folder and (
            module.with_name(f"{module.name}.py").is_file() or (module / "__init__.py").is_file()
        )

    def copy_to(self, target: Path, *, force: bool = False) -> None:
        """Copy the folder, to be changed and run.

        The copy is a package of its own: what its YAML files name in the recipe's package is named in the
        copy's, so that the copy's code is used wherever its files are read.

        Args:
            target: the new folder.
            force: whether files that are there may be overwritten.

        Raises:
            CommandError: if ``target`` exists and ``force`` is not set, or is no folder, or if another
                package or module would be hidden by the copy, or would hide it.
        """
        if target.exists() and not target.is_dir():
            raise CommandError(f"`{target}` is a file; name a folder to copy the recipe to.")
        if target.exists() and any(target.iterdir()) and not force:
            raise CommandError(
                f"`{target}` is not empty; name another folder, or overwrite its files with --force."
            )
        require_writable(target, "the copy")
        old, new = self.package, _package_name(target)
        _refuse_taken(new, target)
        shutil.copytree(
            self.folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"), dirs_exist_ok=True
        )
        for source in (*self.folder.rglob("*.yaml"), *self.folder.rglob("*.py")):
            text = source.read_text(encoding="utf-8")
            if source.suffix == ".yaml":
                renamed = _names_in(old).sub(lambda m: f"{new}.{m[1]}" if self._holds(m[1]) else m[0], text)
            elif old.startswith(
                PACKAGE
            ):  # a copy made before recipes imported their modules by relative names
                renamed = re.sub(rf"\b{re.escape(old)}\b", new, text)
            else:
                continue
            if renamed != text:
                (target / source.relative_to(self.folder)).write_text(renamed, encoding="utf-8")

    def make_importable(self) -> None:
        """Have the classes that ``config.yaml`` names come from this folder.

        Whatever the folder is called by now, and whatever else has the name that its code is imported by:
        that is taken by the folder in this process.
        """
        if str(self.folder.parent) not in sys.path:
            sys.path.insert(0, str(self.folder.parent))
        name = self.package
        named = [match[1] for match in _names_in(name).finditer(self.config.read_text(encoding="utf-8"))]
        modules = dict.fromkeys(path.rpartition(".")[0] for path in named if self._holds(path))
        if modules and (self.folder / "__init__.py").is_file():
            _import_as(name, self.folder)
        for module in modules:
            # Here, where a mistake in them shows its traceback; jsonargparse would leave that out.
            importlib.import_module(f"{name}.{module}")


def _named_classes(config: str) -> Iterator[str]:
    """What the model and the data of a configuration are, which no library has where a recipe has its own."""
    import yaml

    content = yaml.safe_load(config)
    for section in ("model", "data"):
        value = content.get(section) if isinstance(content, dict) else None
        path = value.get("class_path") if isinstance(value, dict) else value
        if isinstance(path, str) and "." in path:
            yield path


def _names_in(package: str) -> re.Pattern[str]:
    """What is named in a package, without the package's name."""
    return re.compile(rf"(?<![\w.]){re.escape(package)}\.([A-Za-z_][\w.]*\w)")


def _package_name(folder: Path) -> str:
    """The name that a folder can be imported by: its own, if that can be one."""
    name = re.sub(r"\W", "_", folder.resolve().name)
    return f"_{name}" if not name or name[0].isdigit() or keyword.iskeyword(name) else name


def _refuse_taken(name: str, target: Path) -> None:
    found = sys.modules.get(name)
    spec = getattr(found, "__spec__", None) or (None if found else importlib.util.find_spec(name))
    places = list(spec.submodule_search_locations or []) if spec else []
    here = str(target.resolve())
    if spec is None or here in map(os.path.realpath, places) or spec.origin is None:
        return  # without an origin it is a folder without code
    raise CommandError(
        f"a copy in `{target}` would be imported as `{name}`, which is the name of {spec.origin}; "
        "name another folder."
    )


def _import_as(name: str, folder: Path) -> None:
    """Import a folder as the package ``name``, in the place of another one."""
    init, places = folder / "__init__.py", [str(folder)]
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
        del sys.modules[loaded]
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
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
    """Look up a recipe by its name or its folder.

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
