"""How long steps take, and how much of it is measuring."""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import Any

import torch

from lightning_memtrain.report.memory_report import StepTimes

# Of a long run the latest steps say enough.
_MAX_STEPS = 10_000


class StepClock:
    """Times the batches of steps, from the arrival of each until its end.

    An accelerator works behind the program: there, marks in its queue are timed, for which nobody waits.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._marks = _marks_of(device)
        self._begun: Any = None
        self._batches: list[tuple[Any, Any]] = []
        # Steps whose marks the device may not have reached yet.
        self._waiting: deque[tuple[bool, list[tuple[Any, Any]]]] = deque()
        self._seconds: dict[bool, deque[float]] = {key: deque(maxlen=_MAX_STEPS) for key in (False, True)}

    def start_batch(self) -> None:
        """A batch has come."""
        self._begun = self._now()

    def end_batch(self) -> None:
        """It is done; it belongs to the open step."""
        if self._begun is not None:
            self._batches.append((self._begun, self._now()))
            self._begun = None

    def drop_step(self) -> None:
        """What was begun will not be ended."""
        self._begun, self._batches = None, []

    def end_step(self, measured: bool) -> None:
        """All batches of a step are done.

        Args:
            measured: whether somebody looked at its memory, which takes time.
        """
        if self._batches:
            self._waiting.append((measured, self._batches))
        self.drop_step()
        # Marks are reached in order, so that few are ever kept.
        while self._waiting and self._is_reached(self._waiting[0][1][-1][1]):
            self._take_first()

    def times(self) -> StepTimes | None:
        """What is known; ``None`` if no step has ended."""
        while self._waiting:
            last = self._waiting[0][1][-1][1]
            if self._marks is not None:
                last.synchronize()
            self._take_first()
        plain, measured = self._seconds[False], self._seconds[True]
        if not plain and not measured:
            return None
        return StepTimes(
            median_seconds=median(plain) if plain else None,
            num_steps=len(plain),
            measured_median_seconds=median(measured) if measured else None,
            num_measured=len(measured),
            measured_seconds=sum(measured),
        )

    def _now(self) -> Any:
        if self._marks is None:
            return time.perf_counter()
        mark = self._marks(enable_timing=True)
        mark.record()
        return mark

    def _is_reached(self, moment: Any) -> bool:
        return self._marks is None or bool(moment.query())

    def _take_first(self) -> None:
        measured, batches = self._waiting.popleft()
        self._seconds[measured].append(
            sum(
                end - begin if self._marks is None else begin.elapsed_time(end) / 1000
                for begin, end in batches
            )
        )


def _marks_of(device: torch.device) -> Any:
    """The class of marks in a device's queue; ``None`` where the program itself does the work."""
    return None if device.type == "cpu" else getattr(getattr(torch, device.type, None), "Event", None)
