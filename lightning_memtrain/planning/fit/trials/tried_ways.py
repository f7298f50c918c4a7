"""What is to be tried, and what a trial came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_memtrain.planning.fit.trials.step_trace import StepTrace
from lightning_memtrain.planning.fit.trials.switched_on import SwitchedOn

#: What is recomputed: names of modules that are called one after the other.
Segments = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Tried:
    """What a trial came to.

    Args:
        num_chunks: of the batch.
        size: samples of the largest chunk.
        segments: what is recomputed.
        allocated_bytes: the peak of the device's allocator.
        needed_bytes: what the device must have: reserved bytes and context on a GPU.
        trace: all else.
    """

    num_chunks: int
    size: int
    segments: Segments
    allocated_bytes: int
    needed_bytes: int
    trace: StepTrace

    @property
    def held(self) -> tuple[tuple[str, int], ...]:
        """Bytes by category at the peak, most first."""
        rows = [(str(category), num) for category, num in self.trace.at_peak.items() if num > 0]
        return tuple(sorted(rows, key=lambda row: -row[1]))


@dataclass(frozen=True)
class Asked:
    """A way that is to be tried.

    Args:
        num_chunks: of the batch.
        segments: what is recomputed.
        switched: further techniques.
        with_calls: whether module calls are followed.
        size: samples of the largest chunk, where ``switched`` has all techniques.
    """

    num_chunks: int
    segments: Segments = ()
    switched: SwitchedOn = field(default_factory=SwitchedOn)
    with_calls: bool = False
    size: int | None = None

    @property
    def key(self) -> Any:
        """What tells it from others; following calls changes nothing of it."""
        on = self.switched
        arguments = tuple(on.trainer_arguments.items())
        return self.num_chunks, self.segments, on.techniques, on.stand_ins, arguments, self.size
