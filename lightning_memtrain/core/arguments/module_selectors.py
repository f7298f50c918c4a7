"""One way to name modules of a model: by path, by a pattern, by class.

A *selector* is

- a path as in ``model.named_modules()``: ``"encoder.layer.0"``,
- a pattern of paths, in which ``*`` stands for any text: ``"encoder.*"``,
- the name of a class, or a pattern of one: ``"Linear"``, ``"*Expert*"``,
- a class: ``nn.Linear``.

A class and its name mean the same: subclasses are meant, too. So a layer is still found when
something has put a subclass in its place (a sparse or a sharded layer, one with a parametrization).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_memtrain.core.arguments.argument_error import ArgumentError
from lightning_memtrain.core.arguments.value_checks import wrong

Selector = str | type[nn.Module]
"""Names modules of a model."""


def as_selectors(owner: str, cure: str, *, least: int = 1, **values: Any) -> tuple[Selector, ...]:
    """Read a list of selectors.

    Args:
        owner: what the user has called.
        cure: what to do, in a sentence, such as an example.
        least: how many there must be.
        **values: the argument.

    Returns:
        The same, as a tuple.

    Raises:
        ArgumentError: naming the argument, if it is no list or something in it is no selector.

    Example:
        >>> as_selectors("Modules", "Write e.g. ['head'].", names_or_types=["head", nn.Linear])
        ('head', <class 'torch.nn.modules.linear.Linear'>)
    """
    ((name, given),) = values.items()
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    if not is_list or len(given) < least or not all(map(_is_selector, given)):
        expected = "a list of paths of modules, patterns of them, class names or classes"
        raise wrong(owner, name, expected, given, cure)
    return tuple(given)


def selects(selector: Selector, path: str, module: nn.Module) -> bool:
    """Whether a selector means a module.

    Args:
        selector: see the module.
        path: of the module in its model; that of the model is empty, and only a class can mean it.
        module: the module.

    Returns:
        Whether it does.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> [selects(one, "enc.0", layer) for one in ("enc.0", "enc.*", "Lin*", nn.Linear, "head")]
        [True, True, True, True, False]
    """
    if isinstance(selector, type):
        return isinstance(module, selector)
    names = _class_names(type(module))
    return any(fnmatchcase(name, selector) for name in names) or (
        bool(path) and (path == selector or fnmatchcase(path, selector))
    )


def _class_names(kind: type) -> tuple[str, ...]:
    """Names of a class and of those that it is derived from; without `Module`, which all are derived from."""
    names = (base.__name__ for base in kind.__mro__ if issubclass(base, nn.Module))
    return tuple(name for name in names if name != "Module")


def selected(owner: str, selectors: Iterable[Selector], modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the modules that are meant.

    Args:
        owner: the argument, for the error, e.g. ``"Modules(names_or_types)"``.
        selectors: each has to mean at least one module.
        modules: all that can be meant, by path.

    Returns:
        The paths.

    Raises:
        ArgumentError: if one means nothing; with the nearest names.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> selected("Modules(names_or_types)", ["Linear"], dict(model.named_modules()))
        {'0'}
    """
    found: set[str] = set()
    for selector in selectors:
        meant = {path for path, module in modules.items() if selects(selector, path, module)}
        if not meant:
            raise matches_nothing(owner, selector, modules)
        found |= meant
    return found


def matches_nothing(
    owner: str,
    selector: Selector,
    modules: Mapping[str, nn.Module] | Iterable[str],
    what: str = "modules of the model",
) -> ArgumentError:
    """The error for a selector that means nothing.

    Args:
        owner: the argument, e.g. ``"Modules(names_or_types)"``.
        selector: means nothing.
        modules: what there is, by path; or paths alone.
        what: what that is.

    Returns:
        The error.

    Example:
        >>> print(matches_nothing("Select(dense)", "haed", ["head"]))  # doctest: +NORMALIZE_WHITESPACE
        `Select(dense)` must name modules of the model, but got 'haed', which matches none. Did you mean
        'head'?
    """
    word = selector_name(selector)
    paths = [path for path in modules if path]
    found = modules.values() if isinstance(modules, Mapping) else ()
    kinds = {type(module).__name__ for module in found if isinstance(module, nn.Module)} - {"Module"}
    near = difflib.get_close_matches(word, [*paths, *sorted(kinds)], n=3)
    if near:
        hint = f"Did you mean {' or '.join(map(repr, near))}?"
    else:
        some = [*paths[:8], *sorted(kinds)[:8]]
        hint = f"There are {', '.join(map(repr, some))}{' ...' if len(paths) > 8 else ''}."
    if not paths and not kinds:
        hint = "There are none to choose from."
    return ArgumentError(f"`{owner}` must name {what}, but got {word!r}, which matches none. {hint}")


def selector_name(selector: Selector) -> str:
    """What a selector is called, which means the same.

    Args:
        selector: see the module.

    Returns:
        It itself, or the name of the class.
    """
    return selector if isinstance(selector, str) else selector.__name__


def _is_selector(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, type) and issubclass(value, nn.Module)
