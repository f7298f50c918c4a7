"""Objects of a configuration file written as Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PACKAGE = "lightning_memtrain."

# Arguments that read well without their names.
_FIRST_ARGUMENTS = ("policy", "limit", "names_or_types", "segments")


def call_text(class_path: str, init_args: Mapping[str, Any]) -> str:
    """The call that makes an object.

    Args:
        class_path: of its class; in this package it begins with ``mt.``.
        init_args: its arguments.

    Returns:
        A Python expression in one line.

    Example:
        >>> every = {"class_path": "lightning_memtrain.checkpointing.Every", "init_args": {"k": 2}}
        >>> call_text("lightning_memtrain.ActivationCheckpointing", {"policy": every})
        'mt.ActivationCheckpointing(mt.checkpointing.Every(k=2))'
    """
    name = f"mt.{class_path[len(_PACKAGE) :]}" if class_path.startswith(_PACKAGE) else class_path
    arguments = [
        value_text(value) if place == 0 and key in _FIRST_ARGUMENTS else f"{key}={value_text(value)}"
        for place, (key, value) in enumerate(init_args.items())
    ]
    return f"{name}({', '.join(arguments)})"


def value_text(value: Any) -> str:
    """A value as Python has it, with double quotes.

    Args:
        value: of a configuration file.

    Returns:
        An expression.
    """
    if isinstance(value, Mapping):
        if "class_path" in value:
            return call_text(value["class_path"], value.get("init_args") or {})
        return f"{{{', '.join(f'{key!r}: {value_text(one)}' for key, one in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    return f'"{value}"' if isinstance(value, str) and '"' not in value and "\\" not in value else repr(value)


def plain_values(value: Any) -> Any:
    """Values as a configuration file has them: lists for tuples, and dictionaries of their own.

    Args:
        value: text, numbers, booleans, ``None``, and sequences and mappings of these.

    Returns:
        The same, copied.
    """
    if isinstance(value, Mapping):
        return {key: plain_values(one) for key, one in value.items()}
    return [plain_values(one) for one in value] if isinstance(value, (list, tuple)) else value


def wrapped(text: str, width: int, indent: int) -> list[str]:
    """Break one line of Python within brackets after its commas.

    Args:
        text: an expression whose long parts are lists of names.
        width: most characters in a line, as far as what is between two commas allows.
        indent: of the first line; others have four more.

    Returns:
        The lines.

    Example:
        >>> wrapped('f(["one", "two"]),', 14, 0)
        ['f(["one",', '    "two"]),']
        >>> wrapped('function(["one"]),', 14, 0)
        ['function(', '    ["one"]),']
    """
    lines, line = [], " " * indent
    for piece in _pieces(text):
        if len(f"{line}{piece}".rstrip()) > width and line.strip():
            lines.append(line.rstrip())
            line = " " * (indent + 4)
        line += piece
    return [*lines, line.rstrip()]


def _pieces(text: str) -> list[str]:
    """Split after each comma and each opening parenthesis that is not within a text."""
    pieces, begin, quote = [], 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "(" or text[place : place + 2] == ", ":
            end = place + (1 if letter == "(" else 2)
            pieces.append(text[begin:end])
            begin = end
    return [*pieces, text[begin:]]
