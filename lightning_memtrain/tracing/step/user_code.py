"""Where in the user's program something happens, and who asks there."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import NamedTuple

_LIBRARIES = (
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "lightning_memtrain",
)
_DISTRIBUTIONS = "torch.distributions"
_PREDICTION = "lightning_memtrain.planning"
# What stands between the line that asks and whoever answers.
_MACHINERY = (
    *("lightning_memtrain.tracing", "lightning_memtrain.ledger", "torch._", "torch.utils", "torch.overrides"),
    *("contextlib", "lightning.fabric.utilities"),
)


class CodeLocation(NamedTuple):
    """A place in a program.

    Args:
        file: path of the file.
        line: number of the line.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def user_location() -> CodeLocation | None:
    """The innermost line on the stack that is the user's, or of a library on top of torch.

    Within a prediction it is one of the predicted step; if that has none, the innermost line of a library
    that is called from there, such as an optimizer's.
    """
    frame: FrameType | None = sys._getframe(1)
    library: CodeLocation | None = None
    while frame is not None:
        if not _is_library(frame):
            return CodeLocation(frame.f_code.co_filename, frame.f_lineno)
        name = frame.f_globals.get("__name__") or ""
        if name.startswith(_PREDICTION):  # further out is who asked for it
            return library
        if library is None and not name.startswith(_MACHINERY):
            library = CodeLocation(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def location_of(error: BaseException) -> CodeLocation | None:
    """The innermost line of the user's code that an error came through.

    Args:
        error: any.

    Returns:
        The line, ``None`` if all are torch's, Lightning's or ours.
    """
    found = None
    entry: TracebackType | None = error.__traceback__
    while entry is not None:
        if not _is_library(entry.tb_frame):
            found = CodeLocation(entry.tb_frame.f_code.co_filename, entry.tb_lineno)
        entry = entry.tb_next
    return found


def _is_library(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__") or ""
    return name.partition(".")[0] in _LIBRARIES or name.startswith("contextlib")


def is_distribution_check() -> bool:
    """Whether the question is one of `torch.distributions`, which ask if what they are given is valid."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name.startswith(_DISTRIBUTIONS):
            return True
        if not name.startswith(("torch", "lightning_memtrain")):
            return False
        frame = frame.f_back
    return False
