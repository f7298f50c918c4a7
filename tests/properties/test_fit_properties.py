"""Microbatch size and recomputation together, beside a search through everything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memtrain.checkpointing.selection.step_chain import ChainStage, simulate
from lightning_memtrain.planning.fit.choice.explorer import Explorer
from lightning_memtrain.planning.fit.choice.pairs import cheapest, chunk_counts, front
from lightning_memtrain.planning.fit.choice.sized_steps import SizedStep, SizedSteps

BATCH_SIZE = 12
HELD_BYTES = 1000


@st.composite
def chains_by_size(draw: st.DrawFn) -> list[tuple[int, int, float]]:
    """Of each stage: saved and returned bytes for a sample, and milliseconds for a sample."""
    number = st.integers(1, 60)
    stages = st.tuples(number, number, st.integers(1, 50).map(float))
    return draw(st.lists(stages, min_size=1, max_size=4))


def chain(stages: Sequence[tuple[int, int, float]], size: int) -> tuple[ChainStage, ...]:
    """A chain whose bytes grow evenly with the number of samples."""
    made, live = [], HELD_BYTES
    for index, (saved, returned, seconds) in enumerate(stages):
        saved, returned = saved * size, returned * size
        before = live
        live += saved + returned
        made.append(
            ChainStage(
                str(index),
                forward_peak_bytes=live,
                backward_peak_bytes=live + returned,
                internal_bytes=saved,
                boundary_bytes=0
                if index == 0
                else made[-1].backward_peak_bytes - made[-1].forward_peak_bytes,
                backward_start_bytes=live,
                own_peak_bytes=live - before,
                seconds=0.1 + seconds * size,
            )
        )
    return tuple(made)


def segmentations(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """All ways to recompute: each stage is kept, begins a segment, or goes on with the one before it."""
    for roles in product("kbg", repeat=len(names)):
        segments: list[list[str]] = []
        before = "k"
        for name, role in zip(names, roles, strict=True):
            if role == "g" and before == "k":
                break
            if role == "b":
                segments.append([name])
            elif role == "g":
                segments[-1].append(name)
            before = role
        else:
            yield tuple(map(tuple, segments))


def steps_of(stages: Sequence[tuple[int, int, float]]) -> SizedSteps:
    """Three traced sizes: the whole batch, halves, and a small one."""
    steps = SizedSteps()
    for count in (1, 2, 6):
        size = BATCH_SIZE // count
        traced = chain(stages, size)
        forward = sum(stage.seconds for stage in traced)
        steps.add(SizedStep(count, size, traced, 3 * forward, 5.0, simulate(traced, ()).peak_bytes + 7))
    return steps


@given(chains_by_size(), st.integers(1, 100))
@settings(max_examples=60)
def test_no_pair_of_chunks_and_recomputation_is_faster_within_the_limit(
    stages: list[tuple[int, int, float]], percent: int
):
    steps = steps_of(stages)
    counts = chunk_counts(BATCH_SIZE)
    curves = [steps.curve(count, math.ceil(BATCH_SIZE / count)) for count in counts]
    pairs = front([curve for curve in curves if curve is not None])
    everything = []
    for count in counts:
        at_size = chain(stages, math.ceil(BATCH_SIZE / count))
        forward = sum(stage.seconds for stage in at_size)
        for segments in segmentations([stage.name or "" for stage in at_size]):
            found = simulate(at_size, segments)
            seconds = count * (3 * forward + found.seconds) + 5.0
            everything.append((found.peak_bytes + 7, seconds))
    most, least = (pick(peak for peak, _ in everything) for pick in (max, min))
    limit_bytes = least + (most - least) * percent // 100
    best = min(seconds for peak, seconds in everything if peak <= limit_bytes)
    chosen = cheapest(pairs, limit_bytes)
    assert chosen is not None
    assert chosen.peak_bytes <= limit_bytes
    assert math.isclose(chosen.seconds, best, rel_tol=1e-9)
    # What nothing keeps is refused, and only that.
    assert cheapest(pairs, least - 1) is None


@given(chains_by_size(), st.lists(st.integers(0, 12_000), min_size=2, max_size=8))
@settings(max_examples=60)
def test_more_budget_is_never_slower_and_never_exceeded(
    stages: list[tuple[int, int, float]], limits: list[int]
):
    steps = steps_of(stages)
    counts = chunk_counts(BATCH_SIZE)
    curves = [steps.curve(count, math.ceil(BATCH_SIZE / count)) for count in counts]
    pairs = front([curve for curve in curves if curve is not None])
    slowest = math.inf
    for limit_bytes in sorted(limits):
        chosen = cheapest(pairs, limit_bytes)
        if chosen is None:
            assert slowest == math.inf
            continue
        assert chosen.peak_bytes <= limit_bytes
        assert chosen.seconds <= slowest
        slowest = chosen.seconds


class Shop:
    """Where steps of a chain are tried, all of whose bytes and seconds are known."""

    times = SimpleNamespace(seconds=sum)
    batch_size = BATCH_SIZE
    device = SimpleNamespace(context_bytes=0)

    def __init__(self, stages: Sequence[tuple[int, int, float]]) -> None:
        self._stages = stages

    def size_of(self, num_chunks: int) -> int:
        return -(-BATCH_SIZE // num_chunks)

    def run(
        self, num_chunks: int, segments: Any, switched: Any, *, with_calls: bool = False
    ) -> SimpleNamespace:
        size = self.size_of(num_chunks)
        traced = chain(self._stages, size)
        forward = sum(stage.seconds for stage in traced)
        return SimpleNamespace(
            num_chunks=num_chunks,
            size=size,
            segments=segments,
            needed_bytes=simulate(traced, segments).peak_bytes + 7,
            trace=SimpleNamespace(
                calls=None,
                state_bytes=7,
                operators=SimpleNamespace(forward=[forward], backward=[2 * forward], update=[5.0]),
            ),
        )

    def ahead(self, ways: Any) -> None:
        """Nothing is gained here by trying ways side by side."""

    def parts_in_seconds(self, tried: SimpleNamespace) -> tuple[float, float]:
        operators = tried.trace.operators
        return sum(operators.forward) + sum(operators.backward), sum(operators.update)

    def profile(self, tried: SimpleNamespace, *args: Any) -> SimpleNamespace:
        return SimpleNamespace(chain=lambda: chain(self._stages, tried.size))


@given(chains_by_size(), st.lists(st.integers(1, 100), min_size=2, max_size=5))
@settings(max_examples=40)
def test_what_is_found_with_more_budget_is_never_slower_and_keeps_the_limit(
    stages: list[tuple[int, int, float]], percents: list[int]
):
    shop = Shop(stages)
    most = shop.run(1, (), ()).needed_bytes
    slowest = math.inf
    for limit_bytes in sorted(most * percent // 100 for percent in percents):
        explorer = Explorer(shop, lambda num_chunks: (), 0.0, 0.0, may_chunk=True)  # type: ignore[arg-type]
        explorer.explore(limit_bytes)
        best = explorer.best(limit_bytes)
        if best is None:
            assert slowest == math.inf  # what was found within less fits as well
            continue
        assert shop.run(best.num_chunks, best.segments, ()).needed_bytes <= limit_bytes
        # What is faster by less than 0.3 % is not looked for.
        assert best.seconds <= 1.003 * slowest
        slowest = best.seconds
