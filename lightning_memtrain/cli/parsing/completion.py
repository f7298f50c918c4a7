"""Completion in a shell, which asks the command itself what may come next: it knows recipes and variants."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.parsing.command_parser import CommandParser

_BASH = """\
_memtrain() {
  local IFS=$'\\n'
  COMPREPLY=($(memtrain __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null))
}
complete -o default -F _memtrain memtrain"""

_ZSH = """\
_memtrain() {
  local -a found
  found=("${(@f)$(memtrain __complete "${(@)words[2,CURRENT]}" 2> /dev/null)}")
  [[ -n $found ]] && compadd -a found || _files
}
compdef _memtrain memtrain"""

_OF_RECIPES = ("show", "copy", "run", "predict", "plan", "profile", "study")


def script(shell: str) -> str:
    """What the shell has to read once.

    Args:
        shell: ``"bash"`` or ``"zsh"``.

    Returns:
        Its code.
    """
    return {"bash": _BASH, "zsh": _ZSH}[shell]


def print_words(parser: CommandParser, words: Sequence[str]) -> int:
    """Print what may be the last word, a line each; nothing where it is a file.

    Args:
        parser: of the command line.
        words: after the command's name; the last one is being typed, and may be empty.

    Returns:
        0.
    """
    *before, typed = words or [""]
    print("\n".join(word for word in _candidates(parser, before) if word.startswith(typed)))
    return 0


def _candidates(parser: CommandParser, before: Sequence[str]) -> list[str]:
    if not before:
        return [*parser.commands, "--help", "--version"]
    command = parser.commands.get(before[0])
    if command is None:
        return []
    if before[-1] == "--variant":
        try:
            return [*recipes.find(before[1]).variants]
        except (CommandError, IndexError):
            return []
    action = command.option(before[-1])
    if action is not None and action.nargs != 0:
        return [str(choice) for choice in action.choices or ()]
    names = [*recipes.installed()] if before[0] in _OF_RECIPES and len(before) == 1 else []
    choices = next((one.choices for one in _positionals(command) if one.choices), None) or ()
    return [*names, *map(str, choices), *command.option_strings]


def _positionals(command: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in command._actions if not action.option_strings]
