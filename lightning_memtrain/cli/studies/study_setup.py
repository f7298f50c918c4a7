"""From a grid file and a recipe to the plan of a study."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lightning_memtrain.cli.errors import CommandError, did_you_mean
from lightning_memtrain.cli.recipes import Recipe
from lightning_memtrain.cli.run import require_jsonargparse
from lightning_memtrain.cli.studies.config_check import check_class_paths
from lightning_memtrain.cli.variants import merge_variants
from lightning_memtrain.study.grid import BASE, Grid, Variant, read_grid
from lightning_memtrain.study.study_folder import StudyFolder
from lightning_memtrain.study.study_plan import StudyPlan, differences, name_differences, plan_study

_PROFILER = "MemoryProfiler"


def load_grid(recipe: Recipe, name: str | None, seeds: tuple[int, ...] | None) -> tuple[str, Grid]:
    """Read the grid of a study.

    Args:
        recipe: what is run.
        name: a file, or the name of one of the recipe's own grids; ``None`` for its default.
        seeds: in the place of the grid's.

    Returns:
        The grid's name, for the study's folder, and the grid.

    Raises:
        CommandError: if there is no such grid, or something of it is wrong.
    """
    path = _find_grid(recipe, name)
    require_jsonargparse()
    try:
        grid = read_grid(_loader()(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise CommandError(f"{path}: {error}") from error
    if grid.recipe not in (None, recipe.name):
        raise CommandError(
            f"{path} is a grid for the recipe `{grid.recipe}`, but the recipe is `{recipe.name}`."
        )
    return path.stem, grid if seeds is None else replace(grid, seeds=seeds)


def make_plan(recipe: Recipe, grid: Grid, remark: Any = None) -> StudyPlan:
    """Make the configurations of all runs.

    Args:
        recipe: what is run.
        grid: what to lay over it.
        remark: is called with each sentence of what one part of a combination sets and another otherwise.

    Returns:
        The plan.

    Raises:
        CommandError: if a variant is unknown, names an unknown class, or two cannot go together.
    """
    config = _loader()(recipe.config.read_text(encoding="utf-8"))
    overlays = {}
    for variant in grid.variants:
        overlays[variant.name], remarks = _overlay(recipe, config, grid, variant)
        for sentence in remarks if remark else ():
            remark(f"{variant.name}: {sentence}")
    return plan_study(recipe.name, grid, overlays)


def check_folder(folder: StudyFolder, plan: StudyPlan, *, resume: bool | None) -> None:
    """See that runs may be added to a folder.

    Args:
        folder: of the study.
        plan: all its runs.
        resume: whether it must hold some of them already, or must not; ``None`` for either.

    Raises:
        CommandError: if it holds something else, or other runs.
    """
    path = folder.path
    if not folder.plan.is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CommandError(
                f"`{path}` exists and is no study: it has no `plan.json`. Name another --study-dir."
            )
        if resume and not path.exists():
            raise CommandError(
                f"there is no study in `{path}` to go on with; leave out --resume to begin one."
            )
        return
    try:
        earlier = StudyPlan.load(folder.plan)
    except ValueError as error:
        raise CommandError(str(error), exit_code=1) from error
    found = differences(earlier, plan)
    if found:
        raise CommandError(
            f"the study in `{path}` is another one: {name_differences(found)}. Take its recipe and grid, "
            "or name another --study-dir."
        )
    if resume is False:
        raise CommandError(f"`{path}` holds this study already; go on with it by --resume.")


def _find_grid(recipe: Recipe, name: str | None) -> Path:
    bundled = {path.stem: path for path in sorted((recipe.folder / "studies").glob("*.yaml"))}
    if name is None:
        if "default" not in bundled:
            raise CommandError(
                f"the recipe `{recipe.name}` brings no grid along; write one and name it with --grid."
            )
        return bundled["default"]
    if name in bundled:
        return bundled[name]
    if Path(name).is_file():
        return Path(name)
    known = f"the recipe has {', '.join(bundled)}" if bundled else "the recipe has none"
    raise CommandError(
        f"`--grid {name}` is no file, and no grid of `{recipe.name}`: {known}.{did_you_mean(name, bundled)}"
    )


def _overlay(
    recipe: Recipe, config: Mapping[str, Any], grid: Grid, variant: Variant
) -> tuple[dict[str, Any], list[str]]:
    load, parts = _loader(), {}
    for owner, layer in grid.layers(variant).items():
        for name in layer.recipe_variants:
            parts[f"{name} of the recipe"] = load(recipe.variant(name).read_text(encoding="utf-8")) or {}
        check_class_paths(dict(layer.config), f"`{owner}`")
        parts[owner] = dict(layer.config)
    try:
        overlay = merge_variants(config, parts)
    except CommandError as error:
        raise CommandError(f"`{variant.name}` cannot be run: {error}") from error
    # That a variant sets what the base sets is what it is for.
    remarks = [line for line in overlay.remarks if variant.members and f"variant `{BASE}`" not in line]
    return _with_profiler(config, overlay.config), remarks


def _with_profiler(recipe: Mapping[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Add the profiler, without which nothing is known of memory, unless it is there."""
    trainer = overlay.get("trainer") or {}
    base = (recipe.get("trainer") or {}).get("callbacks")
    callbacks = [*_entries(trainer.get("callbacks", base)), *_entries(trainer.get("callbacks+"))]
    if any(str(_class_path(one)).rpartition(".")[2] == _PROFILER for one in callbacks):
        return overlay
    key = "callbacks" if "callbacks" in trainer else "callbacks+"
    added = [*_entries(trainer.get(key)), {"class_path": f"lightning_memtrain.{_PROFILER}"}]
    return {**overlay, "trainer": {**trainer, key: added}}


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _class_path(entry: Any) -> Any:
    return entry.get("class_path") if isinstance(entry, Mapping) else entry


def _loader() -> Any:
    from jsonargparse import get_loader

    return get_loader("yaml")  # its numbers are not all that YAML's own would take for numbers


def say(sentence: str) -> None:
    """Say something on the side."""
    print(f"memtrain: {sentence}", file=sys.stderr)
