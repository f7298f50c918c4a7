"""When the pattern changes, counted in optimizer steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_choices, check_counts

TimeUnit = Literal["step", "epoch"]


@dataclass(frozen=True)
class RunLength:
    """How long a run is, as far as it is known.

    Args:
        total_steps: optimizer steps of the whole run; ``None`` if it has no end.
        steps_per_epoch: optimizer steps per epoch; ``None`` if an epoch has no end.
    """

    total_steps: int | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        known = {key: value for key, value in vars(self).items() if value is not None}
        check_counts("RunLength", 0, "Use None for a run or an epoch without end.", **known)


@dataclass(frozen=True)
class UpdateSteps:
    """The steps after which the pattern changes.

    Args:
        pieces: from which step on, and every how many steps; the first step of each piece is its own start,
            except for step 0.
        stop: no later step; ``None`` for no end.
    """

    pieces: tuple[tuple[int, int], ...]
    stop: int | None

    @property
    def start(self) -> int:
        """The step at which schedules begin."""
        return self.pieces[0][0]

    def is_due(self, step: int) -> bool:
        """Whether the pattern changes after a step.

        Args:
            step: optimizer steps completed, from 1.

        Returns:
            Always ``False`` before the first step.
        """
        if step < 1 or (self.stop is not None and step > self.stop):
            return False
        piece = next(((start, period) for start, period in reversed(self.pieces) if step >= start), None)
        return piece is not None and (step - piece[0]) % piece[1] == 0

    @property
    def last(self) -> int | None:
        """The last step that is due; 0 if none is, ``None`` if there is no end."""
        if self.stop is None:
            return None
        for start, period in reversed(self.pieces):
            if start <= self.stop:
                return start + (self.stop - start) // period * period
        return 0


class UpdateSchedule(ABC):
    """Says after which optimizer steps the pattern changes."""

    @abstractmethod
    def in_steps(self, run: RunLength) -> UpdateSteps:
        """Count in steps what a user gave in fractions or epochs.

        Args:
            run: its length.

        Returns:
            The steps.

        Raises:
            MisconfigurationException: if that takes a length which is not known.
        """


@dataclass(frozen=True)
class UpdateEvery(UpdateSchedule):
    """Changes the pattern after every so many optimizer steps.

    Args:
        steps: from one change to the next, at least 1.
        start: not before this step; a float is a fraction of the run, below 1.
        stop: not after this step; a float is a fraction of the run, 1.0 its end. The whole number 1, which
            would be the first step, is refused.

    Raises:
        ArgumentError: if an argument is out of its range, or ``stop`` is before ``start``.

    Example:
        >>> steps = UpdateEvery(100, start=0, stop=0.75).in_steps(RunLength(total_steps=1000))
        >>> [step for step in range(1000) if steps.is_due(step)]
        [100, 200, 300, 400, 500, 600, 700]
    """

    steps: int = 100
    start: int | float = 0
    stop: int | float = 0.75

    def __post_init__(self) -> None:
        _check_period("UpdateEvery(steps)", self.steps)
        _check_time("UpdateEvery(start)", self.start)
        if isinstance(self.start, float) and self.start == 1:
            raise ArgumentError(
                "`UpdateEvery(start)` must be below 1 as a fraction of the run, at whose end nothing is left "
                "to update, but got start=1.0. Write 1 for the first step."
            )
        _check_time("UpdateEvery(stop)", self.stop)
        if isinstance(self.stop, int) and self.stop < 2:
            raise ArgumentError(
                "`UpdateEvery(stop)` must be at least 2 as a whole number, since 1.0 is the end of the run, "
                f"but got stop={self.stop}. Write 1.0 for the end of the run; for one update, after step 1, "
                "write UpdatePiecewise({0: 1}, unit='step', stop=1)."
            )
        if type(self.start) is type(self.stop) and self.stop < self.start:
            raise ArgumentError(
                f"`UpdateEvery(stop)` must not be before start={self.start}, but got stop={self.stop}. "
                "Raise it, or lower start."
            )

    def in_steps(self, run: RunLength) -> UpdateSteps:
        """Count in steps what is given in fractions or epochs."""
        start = _in_steps("UpdateEvery(start)", self.start, run.total_steps)
        stop = _in_steps("UpdateEvery(stop)", self.stop, run.total_steps)
        return UpdateSteps(((start, self.steps),), stop)


@dataclass(frozen=True)
class UpdatePiecewise(UpdateSchedule):
    """Changes the pattern at intervals that differ between parts of the run.

    Args:
        periods: every how many optimizer steps, by when that begins.
        unit: what the beginnings and ``stop`` are counted in: ``"step"`` or ``"epoch"``.
        stop: not after this step or the beginning of this epoch; ``None`` for the end of the run. A float is
            a fraction of the run, below 1.

    Raises:
        ArgumentError: if an argument is out of its range.

    Example:
        >>> update = UpdatePiecewise({0: 100, 2: 200}, unit="epoch", stop=4)
        >>> steps = update.in_steps(RunLength(total_steps=2000, steps_per_epoch=200))
        >>> [step for step in range(2000) if steps.is_due(step)]
        [100, 200, 300, 400, 600, 800]
    """

    periods: Mapping[int, int] = field(default_factory=dict)
    unit: TimeUnit = "epoch"
    stop: int | float | None = None

    def __post_init__(self) -> None:
        check_choices("UpdatePiecewise", get_args(TimeUnit), unit=self.unit)
        if not isinstance(self.periods, Mapping) or not self.periods:
            raise ArgumentError(
                "`UpdatePiecewise(periods)` must map when a part of the run begins to a number of steps, but "
                f"got periods={self.periods!r}. Write e.g. {{0: 100, 25: 200}}."
            )
        for begin, steps in self.periods.items():
            _check_count("UpdatePiecewise(periods)", "a beginning", begin, 0)
            _check_period("UpdatePiecewise(periods)", steps)
        if self.stop is not None:
            _check_time("UpdatePiecewise(stop)", self.stop)
            if isinstance(self.stop, float) and self.stop == 1:
                raise ArgumentError(
                    "`UpdatePiecewise(stop)` must be below 1 as a fraction of the run, since 1 is the "
                    f"beginning of {self.unit} 1, but got stop=1.0. Leave it out for the end of the run."
                )

    def in_steps(self, run: RunLength) -> UpdateSteps:
        """Count in steps what is given in fractions or epochs."""
        scale = 1
        if self.unit == "epoch":
            if run.steps_per_epoch is None:
                raise MisconfigurationException(
                    "`UpdatePiecewise(unit='epoch')` needs epochs of a known length, but the training data "
                    "has none. Use unit='step', or set Trainer(limit_train_batches=...) to a number."
                )
            scale = run.steps_per_epoch
        stop = run.total_steps
        if isinstance(self.stop, float):
            stop = _in_steps("UpdatePiecewise(stop)", self.stop, run.total_steps)
        elif self.stop is not None:
            stop = self.stop * scale
        return UpdateSteps(
            tuple((begin * scale, self.periods[begin]) for begin in sorted(self.periods)), stop
        )


def _in_steps(argument: str, time: int | float, total_steps: int | None) -> int:
    if isinstance(time, int):
        return time
    if total_steps is None:
        raise MisconfigurationException(
            f"`{argument}` is the fraction {time:g} of the run, which needs a run whose length is known, but "
            "this one has no end. Set Trainer(max_steps=...) or max_epochs with data of a known length, or "
            "give a whole number of steps."
        )
    return math.floor(time * total_steps)


def _check_count(argument: str, what: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ArgumentError(
            f"`{argument}` must have {what} that is a whole number of at least {low}, but got {value!r}. "
            f"Use e.g. {100 if low else 0}."
        )


def _check_period(argument: str, value: Any) -> None:
    _check_count(argument, "a number of steps", value, 1)


def _check_time(argument: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value < 0 or (isinstance(value, float) and not value <= 1):
        raise ArgumentError(
            f"`{argument}` must be a whole number of steps, or a fraction of the run as a float in [0, 1], "
            f"but got {value!r}. Use e.g. 1000 or 0.75."
        )
