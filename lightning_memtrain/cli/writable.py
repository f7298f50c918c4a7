"""Find out before anything slow begins that nothing can be written to a place."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lightning_memtrain.cli.errors import CommandError


def require_writable(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be written to, or not be made; nothing is left there.

    Args:
        folder: which may not be there yet.
        what: it is, for the error.

    Raises:
        CommandError: with the folder that stands in the way, and why.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    try:
        # Tried, since permissions do not tell all: of file systems that are mounted to be read, for example.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        why = "it is no folder" if isinstance(error, NotADirectoryError) else error.strerror
        place = "" if nearest == folder.absolute() else f" in `{nearest}`"
        raise CommandError(
            f"{what} `{folder}` cannot be written{place}: {why}. Name another one.", exit_code=1
        ) from error
