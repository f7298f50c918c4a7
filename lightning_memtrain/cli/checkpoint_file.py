"""Reads checkpoints without running anything that they name.

A checkpoint is a pickle, which may call any function by its name. Torch's own loader for weights does not let
it, but for a list of harmless ones; beside these, only what the user has named is looked up.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pathlib
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_memtrain.cli.errors import CommandError

# Of a sharded checkpoint, which is a folder: the file with all that is not sharded.
_SHARDED = "meta.pt"

# What arguments of a model often are. To make one of these does nothing else.
_HARMLESS = (
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.WindowsPath,
    pathlib.PureWindowsPath,
)


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Let checkpoints have paths and namespaces among their values, for the length of the block."""
    import torch

    with torch.serialization.safe_globals(list(_HARMLESS)):
        yield


def trust(names: Sequence[str]) -> None:
    """Let checkpoints have objects of classes that the user names.

    Args:
        names: classes with their modules, which are imported.

    Raises:
        CommandError: if there is no such class.
    """
    import torch

    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise CommandError(f"`--trust {name}` must be a class with its module, but {error}.") from error
        torch.serialization.add_safe_globals([found])


class DamagedError(CommandError):
    """A checkpoint is not as it was written."""


def read_checkpoint(path: Path, *, check: bool = True) -> dict[str, Any]:
    """Read a checkpoint; nothing that it names is imported or called.

    Args:
        path: its file, or its folder if it is sharded; of that only what all processes share is read.
        check: whether to compare all bytes with the checksums that were written with them, which torch does
            not do.

    Returns:
        Its content, with tensors mapped into memory, so that they are read when they are used.

    Raises:
        DamagedError: if it is damaged.
        CommandError: if it is whole and cannot be read.
    """
    import torch

    file = path / _SHARDED if path.is_dir() else path
    try:
        with trusted():
            # Files of the old format cannot be mapped.
            mapped = zipfile.is_zipfile(file)
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CommandError(f"`{path}` cannot be read as a checkpoint: {error}.", exit_code=1) from error
    except Exception as error:  # a damaged file can raise anything
        raise _explained(path, file, error) from error
    if check and mapped and (damaged := _first_damaged(file)):
        raise DamagedError(f"`{path}` is damaged: {damaged} is not as it was written.", exit_code=1)
    if not isinstance(content, dict) or "global_step" not in content:
        raise CommandError(
            f"`{path}` cannot be read as a checkpoint of Lightning: it has no `global_step`. It may hold "
            "weights alone; move it to another folder.",
            exit_code=1,
        )
    return content


def _explained(path: Path, file: Path, error: Exception) -> CommandError:
    if names := _blocked(file, error):
        classes = ", ".join(f"`{name}`" for name in names)
        short = ", ".join(name.rpartition(".")[2] for name in names)
        options = " ".join(f"--trust {name}" for name in names)
        return CommandError(
            f"`{path}` is whole, but has objects of {classes} among its values, as from "
            "`save_hyperparameters`, and nothing that a checkpoint names is imported or called unless you "
            f"name it, too. If you trust the file, resume with {options}, or call "
            f"`torch.serialization.add_safe_globals([{short}])` in the module of your model. New checkpoints "
            'are without them by `self.save_hyperparameters(ignore=["name_of_the_argument"])`.',
            exit_code=1,
        )
    if _is_whole(file):
        reason = re.sub(r"\x1b\[\d+m", "", str(error)).strip().split("\n")[0]
        return CommandError(
            f"`{path}` is whole, but cannot be read as a checkpoint of tensors and plain values: {reason}",
            exit_code=1,
        )
    return DamagedError(
        f"`{path}` cannot be read as a checkpoint, because it is damaged ({type(error).__name__}).",
        exit_code=1,
    )


def _first_damaged(file: Path) -> str | None:
    """The part of an archive that differs from its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except Exception as error:  # the names and sizes of its parts are wrong
        return f"its list of parts ({type(error).__name__})"


def _blocked(file: Path, error: Exception) -> list[str]:
    """What a whole file names that is not harmless."""
    import torch

    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)  # since torch 2.6
    names: list[str] = []
    if find is not None and zipfile.is_zipfile(file):
        with contextlib.suppress(Exception), trusted():  # a damaged file can raise anything
            names = list(find(file))
    if not names:
        names = re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
    return sorted(set(names))


def _is_whole(file: Path) -> bool:
    """Whether a file has its end, and all of its pickle. The directory of an archive is at its end."""
    try:
        with zipfile.ZipFile(file) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return bool(list(pickletools.genops(archive.read(pickled))))
    except Exception:
        return False
