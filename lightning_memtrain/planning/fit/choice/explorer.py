"""The search within one set of switched techniques: few traces, all pairs, the finalists tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_memtrain.planning.fit.choice.bounds import Bounds
from lightning_memtrain.planning.fit.choice.pairs import Pair, SizeCurve, chunk_counts, unbeaten
from lightning_memtrain.planning.fit.choice.sized_steps import SizedStep, SizedSteps
from lightning_memtrain.planning.fit.trials.workshop import Segments, SwitchedOn, Tried, Workshop

# So many finalists are tried for one limit, and so many for the floor.
_MOST_FINALISTS = 10
_MOST_FLOORS = 3
# What is not so much faster than what was found is not tried.
_NOTABLY = 0.997

Switched = Callable[[int], SwitchedOn]


class Explorer:
    """Finds the fastest pair within a limit for a run with some techniques switched on.

    Args:
        workshop: tries ways.
        switched: the techniques, for a number of chunks.
        call_seconds: what recomputing a call takes beside its operators.
        least_bytes: modules that hold less of the whole batch are not looked into.
        may_chunk: whether microbatches may be used.
    """

    def __init__(
        self,
        workshop: Workshop,
        switched: Switched,
        call_seconds: float,
        least_bytes: float,
        may_chunk: bool,
    ) -> None:
        self._workshop = workshop
        self._switched = switched
        self._call_seconds = call_seconds
        self._least_bytes = least_bytes
        self._steps = SizedSteps()
        self._size = workshop.batch_size or 1
        self._all_counts = chunk_counts(self._size) if may_chunk and workshop.batch_size else [1]
        self._counts = self._all_counts
        self._may_recompute = True
        self.tried: dict[tuple[int, tuple[tuple[str, ...], ...]], Tried] = {}
        """What was tried, by chunks and segments."""
        self._others: list[Pair] = []

    @property
    def may_chunk(self) -> bool:
        """Whether the batch can be split, and may be."""
        return len(self._counts) > 1

    def use(self, chunks: bool, recomputation: bool) -> None:
        """Do without what cannot run.

        Args:
            chunks: whether parts of the batch can.
            recomputation: whether modules can be recomputed.
        """
        self._counts = self._all_counts if chunks else [1]
        self._may_recompute = recomputation

    def trace(self, num_chunks: int) -> Tried:
        """Run a number of chunks as they are, and take up what that shows.

        Args:
            num_chunks: of the batch.

        Returns:
            What it came to.
        """
        tried = self._workshop.run(num_chunks, (), self._switched(num_chunks), with_calls=True)
        self.take_up(tried)
        return tried

    def take_up(self, tried: Tried) -> None:
        """Take up what a trial with its module calls shows.

        Args:
            tried: of nothing recomputed.
        """
        chunk_seconds, update_seconds = self._workshop.parts_in_seconds(tried)
        least = self._least_bytes * tried.size / self._size
        chain = self._workshop.profile(tried, self._call_seconds, least).chain()
        self._steps.add(
            SizedStep(
                tried.num_chunks,
                tried.size,
                chain,
                chunk_seconds,
                update_seconds,
                tried.needed_bytes,
            )
        )
        self.tried[tried.num_chunks, ()] = tried

    def explore(self, limit_bytes: int) -> None:
        """Trace what the curves of all numbers of chunks need: the whole batch, halves, and a small size.

        Args:
            limit_bytes: near it the curves should be exact.
        """
        if (1, ()) not in self.tried:
            self.trace(1)
        if len(self._counts) < 2:
            return
        half = self.trace(2)
        if len(self._counts) < 3:
            return
        whole = self.tried[1, ()]
        for_sample = max(1.0, (whole.needed_bytes - half.needed_bytes) / max(1, whole.size - half.size))
        fitting = half.size - (half.needed_bytes - limit_bytes) / for_sample
        wanted = max(half.size / 8, min(fitting, half.size / 2))
        self.trace(min(self._counts[2:], key=lambda count: abs(self._size / count - wanted)))

    def curves(self) -> list[SizeCurve]:
        """Of all numbers of chunks that are known by now."""
        found = [self._steps.curve(count, self._workshop.size_of(count)) for count in self._counts]
        known = [curve for curve in found if curve is not None]
        if not self._may_recompute:  # of each curve the beginning
            known = [replace(curve, schedules=curve.schedules[:1]) for curve in known]
        return known

    def at(self, num_chunks: int, segments: Segments) -> Pair:
        """A pair that no curve leads to, tried.

        Args:
            num_chunks: of the batch.
            segments: what is recomputed.

        Returns:
            The pair, which is one of the front from now on.
        """
        tried = self.tried.get((num_chunks, segments))
        if tried is None:
            tried = self._workshop.run(num_chunks, segments, self._switched(num_chunks))
            self.tried[num_chunks, segments] = tried
        pair = self.pair_of(tried, self._workshop.seconds(tried))
        self._others.append(pair)
        return pair

    def front(self) -> tuple[Pair, ...]:
        """The pairs that no other one beats, what was tried in the place of what the curves say of it."""
        known = [self._as_tried(pair) for curve in self.curves() for pair in curve.pairs()]
        return unbeaten([*known, *self._others])

    def best(self, limit_bytes: int) -> Pair | None:
        """The fastest pair within a limit, which was tried.

        Args:
            limit_bytes: most bytes that the device must have.

        Returns:
            The pair with the bytes that it took; ``None`` if none was found.
        """
        bounds = Bounds(limit_bytes)
        num_finalists = 0
        while num_finalists < _MOST_FINALISTS:
            best = self.best_tried(limit_bytes)
            pair = bounds.next_pair(self.curves(), self._was_tried)
            if pair is None and best is None and self._trace_unknown(limit_bytes):
                num_finalists += 1
                continue
            if pair is None or (best is not None and pair.seconds >= best.seconds * _NOTABLY):
                return best or self._floor_within(limit_bytes)
            if not self._steps.is_near(pair.num_chunks, pair.size):
                self.trace(pair.num_chunks)
                continue
            self._try(pair)
            bounds.note(pair, self._as_tried(pair).peak_bytes)
            num_finalists += 1
        return self.best_tried(limit_bytes) or self._floor_within(limit_bytes)

    def _floor_within(self, limit_bytes: int) -> Pair | None:
        """Before a limit is given up, the pair that needs least."""
        lowest = self.floor()
        return lowest if lowest.peak_bytes <= limit_bytes else None

    def _trace_unknown(self, limit_bytes: int) -> bool:
        """Trace a size that no line leads to, since chunks of other sizes have other stages."""
        too_many = [one for (one, _), tried in self.tried.items() if tried.needed_bytes > limit_bytes]
        unknown = [
            count
            for count in self._counts
            if count > max(too_many, default=0)
            and self._steps.curve(count, self._workshop.size_of(count)) is None
        ]
        if unknown:
            self.trace(unknown[len(unknown) // 2])
        return bool(unknown)

    def floor(self) -> Pair:
        """The pair that needs least, tried."""
        for _ in range(_MOST_FLOORS):
            lowest = self.front()[-1]
            if self._was_tried(lowest):
                return lowest
            self._try(lowest)
        return min(self._tried_pairs(), key=lambda pair: pair.peak_bytes)

    def pair_of(self, tried: Tried, seconds: float) -> Pair:
        """A trial as a pair."""
        return Pair(tried.num_chunks, tried.size, tried.segments, tried.needed_bytes, seconds)

    def _was_tried(self, pair: Pair) -> bool:
        return (pair.num_chunks, pair.segments) in self.tried

    def _as_tried(self, pair: Pair) -> Pair:
        tried = self.tried.get((pair.num_chunks, pair.segments))
        return pair if tried is None else self.pair_of(tried, pair.seconds)

    def _try(self, pair: Pair) -> None:
        tried = self._workshop.run(pair.num_chunks, pair.segments, self._switched(pair.num_chunks))
        self.tried[pair.num_chunks, pair.segments] = tried

    def _tried_pairs(self) -> list[Pair]:
        pairs = [pair for curve in self.curves() for pair in curve.pairs()]
        return [*(self._as_tried(pair) for pair in pairs if self._was_tried(pair)), *self._others]

    def best_tried(self, limit_bytes: int) -> Pair | None:
        """The fastest pair within a limit of those that were tried.

        Args:
            limit_bytes: most bytes that the device must have.

        Returns:
            The pair; ``None`` if there is none.
        """
        fitting = [pair for pair in self._tried_pairs() if pair.peak_bytes <= limit_bytes]
        return min(fitting, key=lambda pair: (pair.seconds, pair.peak_bytes), default=None)
