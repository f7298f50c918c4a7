"""One line out of jsonargparse's many."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable

from lightning_memtrain.cli.errors import did_you_mean

# Lines that say how jsonargparse got there, and not what is wrong.
_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value type:|Given value: (Namespace|NestedArg|\[|{)|"
    r"Not a valid subclass of|Subclass types expect|a class path \(str\)|a dict with|a dict without|"
    r"Expected a <class 'NoneType'>|Expected a path but|Problem with given class_path"
)

# With the lines that are indented below it; those that follow are about other classes that were tried.
_VALUE_OF_A_CLASS = re.compile(
    r'^(?P<indent> *)- Problem with given class_path \S+:\s+Parser key "(?P<key>[^"]+)":\n'
    r"(?P<why>(?:(?P=indent)    .*\n?)+)",
    re.MULTILINE,
)


def shorten_error(message: str, options: Iterable[str], class_names: Iterable[str]) -> str:
    """Say in one line what is wrong with an option.

    Args:
        message: what jsonargparse says.
        options: all options, with their dashes.
        class_names: classes that can be named without their module.

    Returns:
        The option, what is wrong with it, and what may have been meant.
    """
    class_names = list(class_names)
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        return _unknown(match[1].split("=")[0], options)
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        return _unknown(f"--{match[1]}.{match[2]}", options)
    key_match = re.match(r'Parser key "([^"]+)":?\s*', message)
    key = f"`--{key_match[1]}`: " if key_match else ""
    body = message[key_match.end() :] if key_match else message
    if key_match and (match := _VALUE_OF_A_CLASS.search(body)):
        return shorten_error(
            f'Parser key "{key_match[1]}.{match["key"]}":\n{match["why"]}', options, class_names
        )
    if key_match and (match := re.search(r"class_path '(\S+)':\s+Option '(\S+)' is not accepted", body)):
        return _unknown(
            f"--{key_match[1]}.{match[2]}", [f"--{key_match[1]}.{n}" for n in _arguments(match[1])]
        )
    if match := re.search(r"Expected a dot import path string: (\S+)", body):
        if match[1] in class_names:
            return f"{key}`{match[1]}` cannot be used here: another kind of object is expected."
        return f"{key}there is no class `{match[1]}`.{did_you_mean(match[1], class_names)}"
    lines = (line.strip().removeprefix("- ") for line in body.splitlines())
    return key + "; ".join(dict.fromkeys(line for line in lines if line and not _NOISE.match(line)))


def _unknown(option: str, known: Iterable[str]) -> str:
    return f"unknown option `{option}`.{did_you_mean(option, known)}"


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
