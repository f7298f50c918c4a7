"""What a program asks of a tensor whose values nobody knows, and the answers that it usually gets."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LIBRARIES = (
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "lightning_memtrain",
)
_DISTRIBUTIONS = "torch.distributions"


class Site(NamedTuple):
    """A place in a program.

    Args:
        file: path of the file.
        line: number of the line.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Recorded:
    """All of a tensor but what it holds."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """A tensor of this form."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@cache
def asks(func: Any) -> bool:
    """Whether an operator's result is a number, or of a shape, that data decides on.

    Args:
        func: an operator.

    Returns:
        Whether torch says so.
    """
    tags = getattr(func, "tags", ())
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


class AsksForValue(RuntimeError):
    """A step asks for something that only data can tell.

    Args:
        what: the operator, or the method, that asks.
        site: the line of the user's code; ``None`` if there is none on the stack.
    """

    def __init__(self, what: str, site: Site | None) -> None:
        where = f" at {site}" if site is not None else ""
        super().__init__(f"it asks for the value of a tensor ({what}){where}")
        self.what = what
        self.site = site

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.site)


class Answers:
    """What a step with data answered, to be given again to a step without.

    Questions are known by the line of the user's code that asks, and by their order there.
    """

    def __init__(self) -> None:
        self._given: defaultdict[Any, list[Any]] = defaultdict(list)
        self._num_asked: defaultdict[Any, int] = defaultdict(int)

    def add(self, what: str, answer: Any) -> None:
        """Note what data answered, where it was asked now.

        Args:
            what: the operator or method.
            answer: what it gave.
        """
        self._given[what, user_site()].append(answer)

    def rewind(self) -> None:
        """Begin again with the first answers."""
        self._num_asked.clear()

    def next(self, what: str) -> Any:
        """The answer to the question that is asked now.

        Args:
            what: the operator or method.

        Returns:
            What was answered, of equally many questions there; after the last one, the last one's.

        Raises:
            AsksForValue: if nothing was answered there.
        """
        site = user_site()
        given, place = self._given.get((what, site)), self._num_asked[what, site]
        self._num_asked[what, site] += 1
        if not given:
            raise AsksForValue(what, site)
        return given[min(place, len(given) - 1)]

    def pass_by(self, what: str) -> None:
        """Count a question whose answer is known anyway."""
        self._num_asked[what, user_site()] += 1


def user_site() -> Site | None:
    """The innermost line on the stack that is the user's, or of a library on top of torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _is_library(frame):
            return Site(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def site_of(error: BaseException) -> Site | None:
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
            found = Site(entry.tb_frame.f_code.co_filename, entry.tb_lineno)
        entry = entry.tb_next
    return found


def _is_library(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__") or ""
    return name.partition(".")[0] in _LIBRARIES or name.startswith("contextlib")


def asked_by_distributions() -> bool:
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
