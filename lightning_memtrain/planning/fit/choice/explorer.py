"""The search within one set of switched techniques: few traces, all pairs, the finalists tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_memtrain.planning.fit.choice.bounds import Bounds
from lightning_memtrain.planning.fit.choice.pairs import Pair, SizeCurve, chunk_counts, unbeaten
from lightning_memtrain.planning.fit.choice.real_times import RealTimes, TimedPair
from lightning_memtrain.planning.fit.choice.sized_steps import SizedStep, SizedSteps
from lightning_memtrain.planning.fit.trials.real_rounds import Candidate
from lightning_memtrain.planning.fit.trials.switched_on import SwitchedOn
from lightning_memtrain.planning.fit.trials.timed_trial import RealSeconds
from lightning_memtrain.planning.fit.trials.tried_ways import Asked, Segments, Tried
from lightning_memtrain.planning.fit.trials.workshop import Workshop

# So many finalists are tried for one limit, and so many for the floor.
_MOST_FINALISTS, _MOST_FLOORS = 10, 3
# The pair that is to be tried, and the one that would be next if it does not fit.
_SIDE_BY_SIDE = 2
# What is not so much faster than what was found is not tried.
_NOTABLY = 0.997

# What seems to be so much slower at most is run for real as well, and so many others are tried for that.
_NEARLY = 1.12
_MOST_OTHERS = 2
_MOST_TURNS = 2
# So much more than the limit, and a curve need not be asked how near the truth it is.
_FAR = 1.2

Switched = Callable[[int], SwitchedOn]


class Explorer:
    """Finds the fastest pair within a limit for a run with some techniques switched on.

    Args:
        workshop: tries ways.
        switched: the techniques, for a number of chunks.
        call_seconds: what recomputing a call takes beside its operators.
        least_bytes: modules that hold less of the whole batch are not looked into.
        may_chunk: whether microbatches may be used.
        may_time: whether pairs may be run for real, to see how long they take.
        is_late: whether so much time was spent that what was found will do.
        is_thorough: whether the lowest pair is tried before a limit is given up, whatever its curve says.
    """

    def __init__(
        self,
        workshop: Workshop,
        switched: Switched,
        call_seconds: float,
        least_bytes: float,
        may_chunk: bool,
        may_time: bool = False,
        is_late: Callable[[], bool] = lambda: False,
        is_thorough: bool = True,
    ) -> None:
        self._workshop = workshop
        self._switched = switched
        self._call_seconds = call_seconds
        self._least_bytes = least_bytes
        self._steps = SizedSteps(workshop.batch_size)
        self._may_time = may_time
        self._is_late = is_late
        self._is_thorough = is_thorough
        self._real: dict[tuple[int, Segments], tuple[Pair, RealSeconds]] = {}
        self._timed: dict[tuple[int, Segments], TimedPair] = {}
        self._size = workshop.batch_size or 1
        self._all_counts = chunk_counts(self._size) if may_chunk and workshop.batch_size else [1]
        self._counts = self._all_counts
        self._may_recompute = True
        self.tried: dict[tuple[int, Segments], Tried] = {}
        """What was tried, by chunks and segments."""
        self._others: set[tuple[int, Segments]] = set()
        self._num_floors = 0

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
        counts = self._counts[1:2] + self._small_count(limit_bytes)
        self.ahead(counts)
        for count in counts:
            self.trace(count)

    def ahead(self, counts: Sequence[int]) -> None:
        """Begin to trace numbers of chunks, side by side.

        Args:
            counts: those that will be asked for.
        """
        self._workshop.ahead([self.asked(count) for count in counts])

    def asked(self, num_chunks: int, segments: Segments = (), with_calls: bool = True) -> Asked:
        """What is asked of the workshop.

        Args:
            num_chunks: of the batch.
            segments: what is recomputed.
            with_calls: whether module calls are followed.

        Returns:
            The way.
        """
        return Asked(num_chunks, segments, self._switched(num_chunks), with_calls)

    @property
    def least_bytes(self) -> int:
        """Less than any pair needs: what is there when the optimizer steps; 0 before the whole was traced."""
        whole = self.tried.get((1, ()))
        context_bytes = self._workshop.device.context_bytes
        return 0 if whole is None else whole.trace.state_bytes + context_bytes

    def _small_count(self, limit_bytes: int) -> list[int]:
        """A number of chunks that about keep the limit, an eighth to half as large as halves of the batch."""
        if len(self._counts) < 3:
            return []
        whole, half_size = self.tried[1, ()], self._workshop.size_of(2)
        for_sample = max(1.0, (whole.needed_bytes - self.least_bytes) / whole.size)
        fitting = (limit_bytes - self.least_bytes) / for_sample
        wanted = max(half_size / 8, min(fitting, half_size / 2))
        return [min(self._counts[2:], key=lambda count: abs(self._size / count - wanted))]

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
        self._others.add((num_chunks, segments))
        return self._tried_pair((num_chunks, segments), tried)

    def whole(self) -> Pair | None:
        """The batch as a whole with nothing recomputed; ``None`` if that was not tried."""
        tried = self.tried.get((1, ()))
        return None if tried is None else self._tried_pair((1, ()), tried)

    def front(self) -> tuple[Pair, ...]:
        """The pairs that no other one beats, what was tried in the place of what the curves say of it."""
        said = [self._as_tried(pair) for curve in self.curves() for pair in curve.pairs()]
        return unbeaten([*said, *self._tried_pairs()])

    def learn(self, other: Explorer) -> None:
        """Take over what real chunks of another explorer of this run have shown.

        Args:
            other: with other techniques switched on.
        """
        self._steps.real = other._steps.real

    def best(self, limit_bytes: int) -> Pair | None:
        """The fastest pair within a limit, which was tried.

        It is found by the seconds of its operators. Then it and what is hardly slower are run for real, as
        far as that may be, and the curves are corrected by what that shows, until the fastest was run.

        Args:
            limit_bytes: most bytes that the device must have.

        Returns:
            The pair with the bytes that it took; ``None`` if none was found.
        """
        bounds = Bounds(limit_bytes)
        best = self._best_by_operators(limit_bytes, bounds)
        for turn in range(_MOST_TURNS if self._may_time else 0):
            if turn and self._is_late():
                break
            if best is None or not self._time(self._finalists(best, limit_bytes, bounds, turn == 0)):
                break
            best = self.best_tried(limit_bytes)
        return best

    def _best_by_operators(self, limit_bytes: int, bounds: Bounds) -> Pair | None:
        num_finalists = 0
        while num_finalists < _MOST_FINALISTS:
            best = self.best_tried(limit_bytes)
            pair = bounds.next_pair(self.curves(), self._was_tried)
            if pair is None and best is None and self._trace_unknown(limit_bytes):
                num_finalists += 1
                continue
            if pair is None or (
                best is not None and (self._is_late() or pair.seconds >= best.seconds * _NOTABLY)
            ):
                return best or self._floor_within(limit_bytes)
            if not self._steps.is_near(pair.num_chunks, pair.size):
                self.trace(pair.num_chunks)
                continue
            self._try_ahead(bounds.untried(self.curves(), self._was_tried)[:_SIDE_BY_SIDE])
            self._try(pair)
            bounds.note(pair, self._as_tried(pair).peak_bytes)
            num_finalists += 1
        return self.best_tried(limit_bytes) or self._floor_within(limit_bytes)

    def _finalists(self, best: Pair, limit_bytes: int, bounds: Bounds, is_first: bool) -> list[Pair]:
        """What keeps the limit, was not run for real, and may be as fast as the best one; that one first."""
        near = best.seconds * (_NEARLY if is_first else 1.0)
        others = [pair for pair in bounds.untried(self.curves(), self._was_tried) if pair.seconds < near]
        plain = self._largest_plain(limit_bytes, bounds) if is_first else None
        num_others = 0 if self._is_late() else _MOST_OTHERS - (plain is not None)
        self._try_ahead(others[:num_others])
        for pair in others[:num_others]:
            self._try(pair)
            bounds.note(pair, self._as_tried(pair).peak_bytes)
        near = max(near, best.seconds)
        fitting = [pair for pair in self._tried_pairs() if pair.peak_bytes <= limit_bytes]
        found = sorted((one for one in fitting if one.seconds <= near), key=lambda one: one.seconds)
        if plain is not None:  # it tells most of the plain run
            found = [*found[:1], plain, *(pair for pair in found[1:] if pair != plain)]
            found = found[1:] if found[0] == plain else found
        return [pair for pair in found if (pair.num_chunks, pair.segments) not in self._timed]

    def _largest_plain(self, limit_bytes: int, bounds: Bounds) -> Pair | None:
        """The largest chunks that need no recomputation, tried; ``None`` if the curves are off."""
        plain = [pair for curve in self.curves() for pair in curve.pairs()[:1]]
        for pair in [one for one in plain if self._as_tried(one).peak_bytes <= limit_bytes][:_MOST_OTHERS]:
            if not self._was_tried(pair):
                self._try(pair)
                bounds.note(pair, self._as_tried(pair).peak_bytes)
            if self._as_tried(pair).peak_bytes <= limit_bytes:
                return self._as_tried(pair)
        return None

    def _time(self, pairs: Sequence[Pair]) -> bool:
        """Run pairs for real, and correct the curves; whether that showed anything."""
        candidates = []
        for pair in pairs:
            operators = self._steps.operator_seconds(pair.num_chunks, pair.size, pair.segments)
            if operators is not None:
                chunk_seconds = (operators.chunks + operators.recomputed) / pair.num_chunks
                switched = self._switched(pair.num_chunks)
                candidates.append((pair, Candidate(pair.num_chunks, pair.segments, switched, chunk_seconds)))
        traced = [tried for tried in self.tried.values() if tried.trace.calls is not None]
        # The plain run, and what is nearest to the chunks that run for real.
        traced = [traced[0], traced[-1]] if traced else []
        operators_beside = [
            call
            for tried in traced
            for call in (*tried.trace.operators.forward, *tried.trace.operators.backward)
        ]
        found = self._workshop.time([one for _, one in candidates], operators_beside)
        for (pair, _), seconds in zip(candidates, found, strict=True):
            if seconds is not None:
                self._real[pair.num_chunks, pair.segments] = pair, seconds
        if any(found):
            for tried in traced:
                self.take_up(tried)
        self._correct()
        return any(found)

    def _correct(self) -> None:
        """Lay the seconds of operators beside those of all that was run for real."""
        self._timed = {}
        for key, (pair, seconds) in self._real.items():
            operators = self._steps.operator_seconds(pair.num_chunks, pair.size, pair.segments)
            if operators is not None:
                chunks = self._steps.full_chunks(pair.num_chunks, pair.size)
                self._timed[key] = TimedPair(
                    pair.size, operators.chunks, operators.recomputed, chunks * seconds.chunk, seconds.batch
                )
        if self._timed:
            self._steps.real = RealTimes(self._timed.values())

    def _floor_within(self, limit_bytes: int) -> Pair | None:
        """Before a limit is given up, the pair that needs least, unless its curve is far above the limit."""
        if not self._is_thorough and self.front()[-1].peak_bytes > _FAR * limit_bytes:
            return None
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
        while self._num_floors < _MOST_FLOORS:
            lowest = self.front()[-1]
            if self._was_tried(lowest):
                return lowest
            self._num_floors += 1
            self._try(lowest)
        return min(self._tried_pairs(), key=lambda pair: pair.peak_bytes)

    def pair_of(self, tried: Tried, seconds: float) -> Pair:
        """A trial as a pair."""
        return Pair(tried.num_chunks, tried.size, tried.segments, tried.needed_bytes, seconds)

    def _was_tried(self, pair: Pair) -> bool:
        return (pair.num_chunks, pair.segments) in self.tried

    def _as_tried(self, pair: Pair) -> Pair:
        """A pair with what its trial needed and what it took, in the place of what its curve says."""
        key = pair.num_chunks, pair.segments
        return self._tried_pair(key, self.tried[key]) if key in self.tried else pair

    def _tried_pair(self, key: tuple[int, Segments], tried: Tried) -> Pair:
        if key in self._others:
            real = self._steps.real
            chunk, update = self._workshop.parts_in_seconds(tried)
            chunks = real.of_size(tried.size) * key[0] * chunk
            return self.pair_of(tried, chunks + real.batch_seconds + update)
        return self.pair_of(tried, self._steps.seconds(key[0], tried.size, key[1], self._timed.get(key)))

    def _try(self, pair: Pair) -> None:
        tried = self._workshop.run(pair.num_chunks, pair.segments, self._switched(pair.num_chunks))
        self.tried[pair.num_chunks, pair.segments] = tried

    def _try_ahead(self, pairs: Sequence[Pair]) -> None:
        self._workshop.ahead([self.asked(one.num_chunks, one.segments, with_calls=False) for one in pairs])

    def _tried_pairs(self) -> list[Pair]:
        return [self._tried_pair(key, tried) for key, tried in self.tried.items() if self._may_be(key)]

    def _may_be(self, key: tuple[int, Segments]) -> bool:
        return key in self._others or (key[0] in self._counts and (self._may_recompute or not key[1]))

    def best_tried(self, limit_bytes: int) -> Pair | None:
        """The fastest pair within a limit in bytes of those that were tried; ``None`` if there is none."""
        fitting = [pair for pair in self._tried_pairs() if pair.peak_bytes <= limit_bytes]
        return min(fitting, key=lambda pair: (pair.seconds, pair.peak_bytes), default=None)
