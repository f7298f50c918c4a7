"""Objects made of a class's path and plain arguments, as configuration files have them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import lightning_memtrain
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.planning.fit.way import TechniqueSettings

_SUBPACKAGES = ("checkpointing", "microbatching", "optimizer_in_backward", "precision", "sparsity")


def made(settings: TechniqueSettings) -> Any:
    """Make the object that settings describe, a new one at each call.

    Args:
        settings: its class and arguments.

    Returns:
        The callback or plugin.

    Raises:
        ArgumentError: if there is no such class, or it does not take these arguments.

    Example:
        >>> settings = TechniqueSettings("lightning_memtrain.Microbatching", {"microbatch_size": 5})
        >>> made(settings).microbatch_size
        5
    """
    return _object(settings.class_path, settings.init_args)


def _object(class_path: str, init_args: Mapping[str, Any]) -> Any:
    kind = class_of(class_path)
    arguments = {name: _value(value) for name, value in init_args.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ArgumentError(
            f"`{class_path}` must be made of arguments that it knows, but got {dict(init_args)!r}: {error}. "
            "Correct the plan's `init_args`."
        ) from error


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "class_path" in value:
            return _object(value["class_path"], value.get("init_args") or {})
        return {key: _value(one) for key, one in value.items()}
    return [_value(one) for one in value] if isinstance(value, (list, tuple)) else value


def class_of(class_path: str) -> type[Any]:
    """Find a class by its path.

    Args:
        class_path: module and class, e.g. ``"lightning_memtrain.Microbatching"``.

    Returns:
        The class.

    Raises:
        ArgumentError: if there is none.
    """
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(
            f"`class_path` must name a class that can be imported, but got {class_path!r}: {error}. Write "
            "e.g. 'lightning_memtrain.Microbatching'."
        ) from error
    found: type[Any] = kind
    return found


def technique_path(name: str, argument: str) -> str:
    """The path of a technique of this library.

    Args:
        name: of its class, alone or with its module.
        argument: how the user's argument is called in an error.

    Returns:
        The path as a configuration file has it.

    Raises:
        ArgumentError: if there is none of that name.

    Example:
        >>> technique_path("Microbatching", "edit(changes)")
        'lightning_memtrain.Microbatching'
    """
    if "." in name:
        return name
    paths = {known: f"lightning_memtrain.{known}" for known in lightning_memtrain.__all__}
    for subpackage in _SUBPACKAGES:
        names = importlib.import_module(f"lightning_memtrain.{subpackage}").__all__
        paths = {known: f"lightning_memtrain.{subpackage}.{known}" for known in names} | paths
    if name in paths:
        return paths[name]
    near = difflib.get_close_matches(name, paths, n=1)
    cure = f"Did you mean {near[0]!r}?" if near else "Write the path of its class for one of your own."
    raise ArgumentError(f"`{argument}` must name a technique of this library, but got {name!r}. {cure}")
