"""Several variants of a grid written as one, with names in braces."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"\{(\w+)\}")


def expand_templates(variants: Mapping[str, Any]) -> dict[str, Any]:
    """Put each combination of the values under ``for`` into a variant of its own.

    Args:
        variants: entries by name. One with ``for``, a mapping of names to lists of values, stands for as many
            variants as there are combinations of the values; ``{name}`` in its own name and in any text of it
            is replaced by the value. A text that is nothing else becomes the value itself, e.g. a number.

    Returns:
        Entries without ``for``, in order.

    Raises:
        ValueError: if a template names no value, or two variants come out with one name.

    Example:
        >>> expand_templates({"sparse-{part}": {"for": {"part": [0.5, 0.9]}, "strength": "{part}"}})
        {'sparse-0.5': {'strength': 0.5}, 'sparse-0.9': {'strength': 0.9}}
    """
    expanded: dict[str, Any] = {}
    for name, entry in variants.items():
        for key, made in _expand(name, entry):
            if key in expanded:
                raise ValueError(
                    f"`variants` has `{key}` twice. Name every value of `for` in braces in its name."
                )
            expanded[key] = made
    return expanded


def _expand(name: str, entry: Any) -> list[tuple[str, Any]]:
    if not isinstance(entry, Mapping) or "for" not in entry:
        return [(name, entry)]
    values = entry["for"]
    if not isinstance(values, Mapping) or not all(isinstance(one, list) and one for one in values.values()):
        raise ValueError(f"`variants.{name}.for` must map names to lists of values, but got {values!r}.")
    rest = {key: value for key, value in entry.items() if key != "for"}
    expanded = []
    for chosen in itertools.product(*values.values()):
        of_name = dict(zip(map(str, values), chosen, strict=True))
        expanded.append((str(_fill(name, of_name, name)), _fill(rest, of_name, name)))
    return expanded


def _fill(value: Any, of_name: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, Mapping):
        return {_fill(key, of_name, where): _fill(entry, of_name, where) for key, entry in value.items()}
    if isinstance(value, list):
        return [_fill(entry, of_name, where) for entry in value]
    if not isinstance(value, str):
        return value
    whole = _NAME.fullmatch(value)
    if whole and whole[1] in of_name:
        return of_name[whole[1]]

    def replaced(match: re.Match[str]) -> str:
        if match[1] not in of_name:
            raise ValueError(
                f"`variants.{where}` has `{match[0]}`, but its `for` has {', '.join(of_name)} only."
            )
        return str(of_name[match[1]])

    return _NAME.sub(replaced, value)
