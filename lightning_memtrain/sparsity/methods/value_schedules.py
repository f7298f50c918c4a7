"""Values that change over a run: how much to drop, how sparse to be."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_numbers


class Schedule(ABC):
    """A number that changes over a run, e.g. how much to drop."""

    @abstractmethod
    def value(self, step: int, total: int) -> float:
        """The value at a step of the schedule.

        Args:
            step: optimizer steps since the schedule began.
            total: the step at which it ends; at later ones the value stays.

        Returns:
            A finite number.
        """

    @property
    def needs_end(self) -> bool:
        """Whether the value depends on where the schedule ends."""
        return True


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same value at every step.

    Args:
        rate: the value.

    Example:
        >>> ConstantSchedule(0.3).value(step=70, total=100)
        0.3
    """

    rate: float

    def __post_init__(self) -> None:
        _check_finite(self, rate=self.rate)

    def value(self, step: int, total: int) -> float:
        """The same at every step."""
        return self.rate

    @property
    def needs_end(self) -> bool:
        """A constant does not depend on the end."""
        return False


@dataclass(frozen=True)
class _FromTo(Schedule):
    begin: float
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(self, begin=self.begin, end=self.end)

    def value(self, step: int, total: int) -> float:
        """The value at a step; exactly ``begin`` at 0 and ``end`` from ``total`` on."""
        if step >= total:
            return self.end
        return self.end + (self.begin - self.end) * self._left(max(0, step) / total)

    def _left(self, progress: float) -> float:
        """The part of the way that is left, from 1 down to 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearSchedule(_FromTo):
    r"""A straight line: :math:`e + (b - e)(1 - t/T)`.

    Args:
        begin: value :math:`b` at first.
        end: value :math:`e` at last.

    Example:
        >>> LinearSchedule(0.5).value(step=20, total=100)
        0.4
    """

    def _left(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True)
class CosineSchedule(_FromTo):
    r"""Half a cosine wave: :math:`e + \frac{b - e}{2} (1 + \cos(\pi t / T))`.

    Args:
        begin: value :math:`b` at first.
        end: value :math:`e` at last.

    Example:
        >>> round(CosineSchedule(0.3).value(step=25, total=100), 4)
        0.2561

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134.
    """

    def _left(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class CubicSchedule(_FromTo):
    r"""Fast at first, then ever slower: :math:`e + (b - e)(1 - t/T)^3`.

    Args:
        begin: value :math:`b` at first.
        end: value :math:`e` at last.

    Example:
        >>> round(CubicSchedule(0.0, 0.8).value(step=50, total=100), 4)
        0.7

    References:
        Zhu and Gupta, To Prune, or Not to Prune, ICLR Workshop 2018, arXiv:1710.01878.
    """

    def _left(self, progress: float) -> float:
        return (1 - progress) ** 3


def to_schedule(value: Any, argument: str) -> Schedule:
    """A schedule of fractions, or a fraction that stays.

    Args:
        value: what a user gave.
        argument: its name, for the error.

    Returns:
        The schedule.

    Raises:
        ArgumentError: if it is neither, or its first or last value is not in ``[0, 1)``.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = ConstantSchedule(float(value))
    if not isinstance(value, Schedule):
        raise ArgumentError(
            f"`{argument}` must be a number or a schedule such as CosineSchedule(0.3), but got {value!r}. "
            "Use one of them."
        )
    ends = value.value(0, 1), value.value(1, 1)
    if not all(0 <= end < 1 for end in ends):
        raise ArgumentError(
            f"`{argument}` must stay in [0, 1), but got {value!r}. It is a fraction, not percent."
        )
    return value


def _check_finite(schedule: Schedule, **values: float) -> None:
    check_numbers(type(schedule).__name__, "a finite number", lambda x: True, "Use e.g. 0.3.", **values)
