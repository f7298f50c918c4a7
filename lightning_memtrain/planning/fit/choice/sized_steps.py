"""Steps of a few sizes that were traced, and from them the curve of any number of chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_memtrain.checkpointing.selection.pareto_schedules import pareto
from lightning_memtrain.checkpointing.selection.step_chain import ChainStage, CheckpointSchedule, simulate
from lightning_memtrain.planning.fit.choice.between_sizes import alike, between, on_line
from lightning_memtrain.planning.fit.choice.pairs import SizeCurve
from lightning_memtrain.planning.fit.choice.real_times import RealTimes, TimedPair

_HARDLY_ANOTHER = 1.3


@dataclass(frozen=True)
class SizedStep:
    """A step that was traced.

    Args:
        num_chunks: of its batch.
        size: samples of the largest chunk.
        chain: one chunk as stages.
        chunk_seconds: forward and backward of one chunk.
        update_seconds: once for a batch.
        needed_bytes: what the device must have for it.
    """

    num_chunks: int
    size: int
    chain: tuple[ChainStage, ...]
    chunk_seconds: float
    update_seconds: float
    needed_bytes: int


@dataclass(frozen=True)
class OperatorSeconds:
    """What the operators of a step take one by one.

    Args:
        chunks: forward and backward of all chunks, without recomputation.
        recomputed: what recomputation adds to that.
        update: once for the batch.
    """

    chunks: float
    recomputed: float
    update: float


class SizedSteps:
    """All that was traced of a run with one set of techniques.

    A batch as a whole is another matter than chunks of it, which find the gradients of earlier ones: it is
    known once it was traced. Between two traced sizes of chunks, and beyond them, all is on a straight line.

    Args:
        batch_size: samples of the batch, which chunks are even parts of; ``None`` if they all have the size
            that is said of them.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        self._batch_size = batch_size
        self.real = RealTimes()
        """Corrects seconds."""
        self._whole: SizedStep | None = None
        self._chunked: dict[int, SizedStep] = {}
        self._schedules: dict[int, tuple[CheckpointSchedule, ...]] = {}

    def add(self, step: SizedStep) -> None:
        """Take up what was traced.

        Args:
            step: the step.
        """
        if step.num_chunks == 1:
            self._whole = step
            self._schedules.pop(1, None)
        else:
            self._chunked[step.size] = step
            self._schedules = {count: one for count, one in self._schedules.items() if count == 1}

    def is_near(self, num_chunks: int, size: int) -> bool:
        """Whether a size was traced itself, or one that is hardly another."""
        if num_chunks == 1:
            return self._whole is not None
        return any(1 / _HARDLY_ANOTHER <= size / one <= _HARDLY_ANOTHER for one in self._chunked)

    def curve(self, num_chunks: int, size: int) -> SizeCurve | None:
        """What so many chunks can be made to hold, and how long that takes.

        Args:
            num_chunks: of the batch.
            size: samples of the largest chunk.

        Returns:
            The curve; ``None`` if nothing like it was traced.
        """
        step = self._whole if num_chunks == 1 else self._between(num_chunks, size)
        if step is None:
            return None
        if num_chunks not in self._schedules:
            self._schedules[num_chunks] = pareto(step.chain)
        schedules = self._schedules[num_chunks]
        factor = self.real.of_size(size)
        chunks = self.full_chunks(num_chunks, size) * factor
        return SizeCurve(
            num_chunks,
            size,
            chunks * step.chunk_seconds + self.real.batch_seconds + step.update_seconds,
            schedules,
            step.needed_bytes - schedules[0].peak_bytes,
            chunks * self.real.of_recomputation,
        )

    def operator_seconds(
        self, num_chunks: int, size: int, segments: Sequence[Sequence[str]]
    ) -> OperatorSeconds | None:
        """What operators take one by one.

        Args:
            num_chunks: of the batch.
            size: samples of the largest chunk.
            segments: what is recomputed in each.

        Returns:
            The seconds; ``None`` if nothing like it was traced.
        """
        step = self._whole if num_chunks == 1 else self._between(num_chunks, size)
        if step is None:
            return None
        chunks = self.full_chunks(num_chunks, size)
        more = simulate(step.chain, segments).seconds if segments else 0.0
        return OperatorSeconds(chunks * step.chunk_seconds, chunks * more, step.update_seconds)

    def seconds(
        self, num_chunks: int, size: int, segments: Sequence[Sequence[str]], timed: TimedPair | None
    ) -> float:
        """What a batch takes.

        Args:
            num_chunks: of the batch.
            size: samples of the largest chunk.
            segments: what is recomputed in each.
            timed: what its chunks took for real; ``None`` if they were not run.

        Returns:
            The seconds; infinitely many where nothing like it was traced.
        """
        operators = self.operator_seconds(num_chunks, size, segments)
        update = 0.0 if operators is None else operators.update
        if timed is not None:
            return timed.seconds + timed.batch_seconds + update
        if operators is None:
            return math.inf  # a size that no line leads to
        chunks = operators.chunks + self.real.of_recomputation * operators.recomputed
        return self.real.of_size(size) * chunks + self.real.batch_seconds + update

    def full_chunks(self, num_chunks: int, size: int) -> float:
        """Chunks of that size that take as long as all, since those of an uneven batch are not all as large.

        Args:
            num_chunks: of the batch.
            size: samples of the largest chunk.

        Returns:
            At most ``num_chunks``.
        """
        if self._batch_size is None:
            return num_chunks
        return min(num_chunks, self._batch_size / size)

    def _between(self, num_chunks: int, size: int) -> SizedStep | None:
        if size in self._chunked:
            return self._chunked[size]
        sizes = sorted(self._chunked)
        if len(sizes) < 2:
            return None
        place = sum(one < size for one in sizes)
        low, high = (sizes[max(0, min(place - 1, len(sizes) - 2)) + offset] for offset in (0, 1))
        one, other = self._chunked[low], self._chunked[high]
        if not alike(one.chain, other.chain):
            return None
        where = (size - low) / (high - low)
        chunk_seconds = on_line(one.chunk_seconds, other.chunk_seconds, where)
        if size < low:  # smaller chunks do not use the device better
            chunk_seconds = max(chunk_seconds, one.chunk_seconds * size / low)
        return SizedStep(
            num_chunks,
            size,
            between(one.chain, other.chain, where),
            chunk_seconds,
            one.update_seconds,
            round(on_line(one.needed_bytes, other.needed_bytes, where)),
        )
