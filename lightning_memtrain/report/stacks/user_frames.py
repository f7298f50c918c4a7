"""The user's own line of code among the frames of a stack."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_PACKAGE = Path(__file__).resolve().parents[2]
# What stands between the user's code and operators.
_FRAMEWORKS = (
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "lightning_utilities",
)
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
# Where a backward begins: frames around it are not those that its operators come from.
_BACKWARD = (os.path.join("torch", "autograd", "graph.py"), "_engine_run_backward")


class CodeLine(NamedTuple):
    """A line of code.

    Args:
        file: its path; in a notebook the name of the cell.
        line: its number, from 1.
        function: in which it is.
    """

    file: str
    line: int
    function: str


def line_of_user(frame: FrameType | None) -> CodeLine | None:
    """The innermost line of the user's code.

    Code beside Python's packages is the user's. Where there is none within what Lightning has called, as in
    a project that is installed, it is that of the package that it is in; and where there is none at all, the
    line that has called Lightning.

    Args:
        frame: the innermost one to look at.

    Returns:
        The line; ``None`` within a backward that no code of the user's has called anything in.
    """
    of_package: CodeLine | None = None
    is_outside = False
    while frame is not None:
        code = frame.f_code
        kind = _kind_of(code.co_filename)
        if kind == "user":
            if of_package is not None and is_outside:
                return of_package
            return CodeLine(code.co_filename, frame.f_lineno, code.co_name)
        if kind == "package" and of_package is None and not is_outside:
            of_package = CodeLine(code.co_filename, frame.f_lineno, code.co_name)
        is_outside |= kind == "lightning"
        if code.co_name == _BACKWARD[1] and code.co_filename.endswith(_BACKWARD[0]):
            return of_package
        frame = frame.f_back
    return of_package


@functools.cache
def _kind_of(file: str) -> str:
    """``"user"``, ``"package"``, ``"lightning"`` or ``"framework"``."""
    if file.startswith("<") and not file.startswith("<ipython"):
        return "framework"  # made by Python or torch
    path = os.path.realpath(file)
    if path.startswith(f"{_PACKAGE}{os.sep}"):
        inside = os.path.relpath(path, _PACKAGE).split(os.sep)[0]
        return "user" if inside == "recipes" else "framework"
    for folder in _installed():
        if path.startswith(f"{folder}{os.sep}"):
            name = os.path.relpath(path, folder).split(os.sep)[0].removesuffix(".py")
            return "lightning" if name in _LIGHTNING else "framework" if name in _FRAMEWORKS else "package"
    return "framework" if path.startswith(f"{_standard_library()}{os.sep}") else "user"


@functools.cache
def _installed() -> tuple[str, ...]:
    """Folders in which packages are installed."""
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    folders |= {one for one in sys.path if os.path.basename(one) in ("site-packages", "dist-packages")}
    for name in _FRAMEWORKS:  # wherever these lie
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            folders.add(os.path.dirname(os.path.dirname(file)))
    return tuple(sorted({os.path.realpath(one) for one in folders}, key=len, reverse=True))


@functools.cache
def _standard_library() -> str:
    return os.path.realpath(sysconfig.get_path("stdlib"))
