"""Errors that a user can put right, and the nearest match for what was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a shell reports for a command that was stopped by Ctrl-C (128 + SIGINT).
INTERRUPTED = 130


class CommandError(Exception):
    """The command cannot do what was asked; printed as one line, without a traceback.

    Args:
        message: what was expected, what came and what to do.
        exit_code: 2 for a mistake in the command line, 1 for one in what it refers to.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Point from a mistyped word to the nearest known one.

    Args:
        word: what was typed.
        known: what could have been meant.

    Returns:
        A sentence that starts with a space, or nothing if no known word is near or starts with the typed one.

    Example:
        >>> did_you_mean("recipse", ["run", "recipes"])
        ' Did you mean `recipes`?'
        >>> did_you_mean("rec", ["run", "recipes"])
        ' Did you mean `recipes`?'
        >>> did_you_mean("xyz", ["run", "recipes"])
        ''
    """
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=1)
    nearest += [name for name in known if word and name.startswith(word)]
    return f" Did you mean `{nearest[0]}`?" if nearest else ""
