"""Parsers whose mistakes are one line each."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lightning_memtrain.__about__ import __version__
from lightning_memtrain.cli.errors import CommandError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a :class:`CommandError`."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        raise CommandError(f"{message}. See `{self.prog} --help`.")

    def option(self, name: str) -> argparse.Action | None:
        """An option by its name with its dashes; ``None`` if there is none."""
        return self._option_string_actions.get(name)

    @property
    def option_strings(self) -> list[str]:
        """All options, with their dashes."""
        return list(self._option_string_actions)


class CommandParser(Parser):
    """The parser of the whole command line: knows all commands and their options."""

    def __init__(self) -> None:
        summary = "Train in less memory and see where every byte goes."
        super().__init__(prog="memtrain", description=summary, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"memtrain {__version__}")
        self._subparsers_action = self.add_subparsers(
            metavar="COMMAND", title="commands", parser_class=Parser
        )
        self.commands: dict[str, Parser] = {}

    def add(self, name: str, summary: str, options: Parser | None = None) -> Parser:
        """Add a command.

        Args:
            name: of the command.
            summary: what it does, for the list of commands.
            options: that it shares with others.

        Returns:
            Its parser.
        """
        command = self._subparsers_action.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            allow_abbrev=False,
            parents=[options] if options else [],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.commands[name] = command
        return command

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action is self._subparsers_action and value not in self.commands:
            hint = did_you_mean(str(value), self.commands)
            raise CommandError(f"unknown command `{value}`.{hint} `memtrain --help` lists all.")
        super()._check_value(action, value)
