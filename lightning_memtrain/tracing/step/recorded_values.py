"""What only data can tell, recorded in a step with data and replayed in one without."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.tracing.step.user_code import CodeLocation, user_location


@dataclass(frozen=True)
class TensorForm:
    """All of a tensor but what it holds."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """A tensor of this form."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@cache
def needs_data(func: Any) -> bool:
    """Whether an operator's result is a number, or of a shape, that data decides on.

    Args:
        func: an operator.

    Returns:
        Whether torch says so.
    """
    tags = getattr(func, "tags", ())
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


class UnknownValueError(RuntimeError):
    """A step asks for something that only data can tell.

    Args:
        what: the operator, or the method, that asks.
        location: the line of the user's code; ``None`` if there is none on the stack.
    """

    def __init__(self, what: str, location: CodeLocation | None) -> None:
        where = f" at {location}" if location is not None else ""
        super().__init__(f"it asks for the value of a tensor ({what}){where}")
        self.what = what
        self.location = location

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.location)


class RecordedValues:
    """What a step with data answered, to be given again to a step without.

    Questions are known by the line of the user's code that asks, and by their order there.
    """

    def __init__(self) -> None:
        self._given: defaultdict[Any, list[Any]] = defaultdict(list)
        self._num_asked: defaultdict[Any, int] = defaultdict(int)

    def record(self, what: str, answer: Any) -> None:
        """Note what data answered, where it was asked now.

        Args:
            what: the operator or method.
            answer: what it gave.
        """
        self._given[what, user_location()].append(answer)

    def rewind(self) -> None:
        """Begin again with the first answers."""
        self._num_asked.clear()

    def replay(self, what: str, asked: Any = None) -> Any:
        """The answer to the question that is asked now.

        Args:
            what: the operator or method.
            asked: whose value it is, if it is one tensor's.

        Returns:
            What was answered, of equally many questions there; after the last one, the last one's.

        Raises:
            UnknownValueError: if nothing was answered there.
        """
        location = user_location()
        given, place = self._given.get((what, location)), self._num_asked[what, location]
        self._num_asked[what, location] += 1
        if not given:
            raise UnknownValueError(what, location)
        return given[min(place, len(given) - 1)]

    def skip(self, what: str) -> None:
        """Count a question whose answer is known anyway."""
        self._num_asked[what, user_location()] += 1


class GuessedNumbers(RecordedValues):
    """Takes a number of floating type that nobody knows for "not a number"; it may only be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.guessed: dict[str, str] = {}
        """What was asked, by the line that asked."""

    def replay(self, what: str, asked: Any = None) -> Any:
        """The answer to the question that is asked now.

        Args:
            what: the operator or method.
            asked: whose value it is, if it is one tensor's.

        Returns:
            Not a number.

        Raises:
            UnknownValueError: if it is no question for a number of floating type.
        """
        is_number = isinstance(asked, Tensor) and what == str(torch.ops.aten._local_scalar_dense.default)
        if not is_number or not asked.is_floating_point():
            raise UnknownValueError(what, user_location())
        self.guessed.setdefault(str(user_location()), what)
        return float("nan")

    def skip(self, what: str) -> None:
        """A question whose answer is known anyway is none."""
