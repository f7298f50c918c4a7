"""What can be set of a recipe, for ``memtrain run RECIPE --help``."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from typing import Any

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.recipes import Recipe

_WIDTH = 100
_SECTIONS = ("model", "data")


def settings_text(recipe: Recipe) -> str:
    """List the options of a recipe's model, data and Trainer, with the values that it gives them.

    Args:
        recipe: any.

    Returns:
        Lines to print.
    """
    import yaml
    from lightning.pytorch import Trainer

    if recipe not in recipes.installed().values():
        recipe.make_importable()
    config = yaml.safe_load(recipe.config.read_text(encoding="utf-8")) or {}
    lines = [f"What can be set of `{recipe.name}`, with its values:"]
    for section in _SECTIONS:
        kind, given = _class_and_arguments(config.get(section))
        if kind is not None:
            lines.append(f"\n{section}: {kind.__name__}")
            words = _words_of(kind)
            for name, parameter in inspect.signature(kind).parameters.items():
                if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    continue
                value = given.get(name, parameter.default)
                shown = "" if value is parameter.empty else f"={_short(value)}"
                lines += _wrapped(f"  --{section}.{name}{shown}", words.get(name, ""))
    trainer = config.get("trainer") or {}
    lines.append("\nTrainer")
    lines += [f"  --trainer.{name}={_short(value)}" for name, value in trainer.items()]
    others = [name for name in inspect.signature(Trainer).parameters if name not in trainer]
    lines += textwrap.wrap(
        f"also: {', '.join(others)}", _WIDTH, initial_indent="  ", subsequent_indent="    "
    )
    if recipe.variants:
        lines.append("\nVariants, by --variant NAME")
        lines += [f"  {name:26} {recipes.describe(path)}".rstrip() for name, path in recipe.variants.items()]
    return "\n".join(lines)


def _class_and_arguments(config: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(config, str):
        config = {"class_path": config}
    if not isinstance(config, dict) or "class_path" not in config:
        return None, {}
    module, _, name = config["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name), config.get("init_args") or {}


def _words_of(kind: Any) -> dict[str, str]:
    """What its documentation says of each argument."""
    try:
        from docstring_parser import parse
    except ImportError:  # without the extra `cli`
        return {}
    found = parse(inspect.getdoc(kind) or "").params
    return {one.arg_name: " ".join((one.description or "").split()) for one in found}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(option: str, words: str) -> list[str]:
    if not words:
        return [option]
    if len(option) < 34 and len(words) <= _WIDTH - 36:
        return [f"{option:34}  {words}"]
    return [option, *textwrap.wrap(words, _WIDTH, initial_indent=" " * 36, subsequent_indent=" " * 36)]
