from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memtrain.checkpointing.selection import pareto_schedules
from lightning_memtrain.checkpointing.selection.pareto_schedules import fitting, knee, pareto
from lightning_memtrain.checkpointing.selection.step_chain import ChainStage, CheckpointSchedule, simulate

Segments = tuple[tuple[str, ...], ...]

# The input has 10 bytes. The modules save 20, 30 and 40 bytes and return 5, 5 and 1, which the next one saves
# as its input; each gradient is as large as its tensor, and the input has none.
CHAIN = (
    ChainStage("a", 35, 40, 20, 0, 35, 25, 1.0),
    ChainStage("b", 70, 75, 30, 5, 70, 35, 2.0),
    ChainStage("c", 111, 117, 40, 5, 112, 41, 4.0),
)
NO_PEAK = ChainStage(None, 0, 0)


@pytest.mark.parametrize(
    ("segments", "peak_bytes", "seconds"),
    [
        ((), 117, 0.0),  # backward of c
        ((("a",),), 117 - 20, 1.0),
        ((("b",),), 117 - 30, 2.0),
        ((("c",),), 117, 4.0),  # all of c is back before its backward
        ((("a",), ("b",)), 117 - 20 - 30, 3.0),
        ((("b",), ("a",)), 117 - 20 - 30, 3.0),
        # c's forward has 10 + 5 + 40 + 1 left, but when b runs again, all that a and b saved is back.
        ((("a", "b"),), 75, 3.0),
        ((("b", "c"),), 117, 6.0),
        ((("a",), ("b",), ("c",)), 67, 7.0),
    ],
)
def test_peaks_by_hand(segments: Segments, peak_bytes: int, seconds: float):
    assert simulate(CHAIN, segments) == CheckpointSchedule(peak_bytes, seconds, segments)


def test_the_curve_by_hand():
    assert pareto(CHAIN) == (
        CheckpointSchedule(117, 0.0, ()),
        CheckpointSchedule(97, 1.0, (("a",),)),
        CheckpointSchedule(87, 2.0, (("b",),)),
        CheckpointSchedule(67, 3.0, (("a",), ("b",))),
    )


def test_a_segment_frees_what_lies_between_its_members():
    # With twice c's bytes, keeping b's input, which is a's output, costs 5 bytes at the peak.
    chain = (*CHAIN[:2], replace(CHAIN[2], forward_peak_bytes=151, backward_peak_bytes=157))
    assert simulate(chain, [("a",), ("b",)]).peak_bytes == 157 - 20 - 30
    assert simulate(chain, [("a", "b")]).peak_bytes == 157 - 20 - 30 - 5
    assert pareto(chain)[-1] == CheckpointSchedule(102, 3.0, (("a", "b"),))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        # Each number is what makes one moment the highest one, and its peak is worked out beside it.
        ("forward_peak_bytes", (0, 300, 0), 300 - 20),  # b's forward, once a's saved bytes are gone
        ("forward_peak_bytes", (0, 0, 300), 300 - 20 - 30 - 5),
        ("backward_peak_bytes", (300, 0, 0), 300),
        ("backward_peak_bytes", (0, 300, 0), 300),
        ("backward_peak_bytes", (0, 0, 300), 300 - 20 - 30 - 5),
        ("own_peak_bytes", (300, 0, 0), 70 - 20 - 30 - 5 + 300),  # a again, with nothing of b back
        ("own_peak_bytes", (0, 300, 0), 70 - 30 + 300),
        ("backward_start_bytes", (0, 300, 0), 300 - 30 + 35),
    ],
)
def test_each_moment_of_a_segment_can_be_the_peak(field: str, value: tuple[int, ...], expected: int):
    chain = [
        replace(stage, **{field: one or getattr(stage, field)})
        for stage, one in zip(CHAIN, value, strict=True)
    ]
    assert simulate(chain, [("a", "b")]).peak_bytes == expected
    curve = pareto(chain)
    assert all(simulate(chain, one.segments) == one for one in curve)


def test_what_the_first_of_a_segment_has_to_keep_beside():
    a, b, c = CHAIN
    chain = (replace(a, opening_bytes=7), replace(b, opening_bytes=9), c)
    assert simulate(chain, [("a",)]).peak_bytes == 117 - 20 + 7
    assert simulate(chain, [("b",)]).peak_bytes == 117 - 30 + 9
    assert simulate(chain, [("a",), ("b",)]).peak_bytes == 117 - 20 - 30 + 7 + 9
    # What b would have to keep is of no concern where it is the second one.
    assert simulate(chain, [("a", "b")]).peak_bytes == 75 + 7
    lasting = (replace(chain[0], backward_peak_bytes=200), b, c)
    assert simulate(lasting, [("a", "b")]).peak_bytes == 200 + 7
    assert simulate((replace(a, forward_peak_bytes=200, opening_bytes=7), b, c), [("a",)]).peak_bytes == 200
    assert [(one.peak_bytes, one.segments) for one in pareto(chain)] == [
        (117, ()),
        (104, (("a",),)),
        (96, (("b",),)),
        (82, (("a", "b"),)),
    ]


def test_the_tail_of_an_item_runs_only_before_others_of_its_segment():
    chain = [replace(stage, tail_seconds=tail) for stage, tail in zip(CHAIN, (0.5, 0.25, 8.0), strict=True)]
    assert simulate(chain, [("a",), ("b",)]).seconds == 3.0
    assert simulate(chain, [("a", "b")]).seconds == 3.5
    assert simulate(chain, [("a", "b", "c")]).seconds == 7.75


def test_parts_stand_for_an_item_that_is_kept():
    parts = (
        ChainStage("block.x", 35, 40, 20, 0, 35, 25, 1.0),
        ChainStage(None, 38, 38),
        ChainStage("block.y", 70, 75, 30, 5),
    )
    block = ChainStage("block", 70, 75, 55, 0, 70, 60, 3.0, parts=parts)
    chain = (block, CHAIN[2])
    assert simulate(chain, [("block",)]) == CheckpointSchedule(75, 3.0, (("block",),))
    assert simulate(chain, [("block.x",)]) == CheckpointSchedule(117 - 20, 1.0, (("block.x",),))
    assert [one.segments for one in pareto(chain)] == [(), (("block.y",),), (("block.x",), ("block.y",))]
    higher = (replace(block, parts=(*parts, ChainStage(None, 200, 0))), CHAIN[2])
    assert simulate(higher, ()).peak_bytes == 200
    assert simulate(higher, [("block",)]).peak_bytes == 75


def test_an_empty_chain_needs_nothing():
    assert pareto(()) == (CheckpointSchedule(0, 0.0, ()),)


# --- Against a search through everything


def all_choices(chain: Sequence[ChainStage]) -> Iterator[Segments]:
    """Every choice for modules that are called once."""
    if not chain:
        yield ()
        return
    for rest in all_choices(chain[1:]):
        for inner in all_choices(chain[0].parts):
            yield (*inner, *rest)
    for length in range(1, len(chain) + 1):
        names = tuple(stage.name for stage in chain[:length])
        if None in names:
            break
        for rest in all_choices(chain[length:]):
            yield (names, *rest)


def everything(chain: Sequence[ChainStage]) -> list[CheckpointSchedule]:
    """Every choice there is, modules with several calls included."""
    calls = Counter(item_names(chain))
    shared = [name for name, num in calls.items() if num > 1]
    tried = {
        segments
        for segments in all_choices(chain)
        if not any(name in shared for names in segments for name in names)
    }
    found = []
    for num in range(len(shared) + 1):
        for some in combinations(shared, num):
            for segments in tried:
                try:
                    found.append(simulate(chain, (*segments, *((name,) for name in some))))
                except ValueError as error:
                    assert "within another one" in str(error)  # noqa: PT017
    return found


def item_names(chain: Sequence[ChainStage]) -> list[str]:
    return [
        name for stage in chain for name in ([stage.name] if stage.name else []) + item_names(stage.parts)
    ]


def assert_is_the_front_of(
    curve: tuple[CheckpointSchedule, ...], tried: list[CheckpointSchedule], chain: Sequence[ChainStage]
) -> None:
    assert curve[0].segments == ()
    for one in curve:
        found = simulate(chain, one.segments)
        assert (found.peak_bytes, found.seconds) == (one.peak_bytes, one.seconds)
    assert fitting(curve, min(one.peak_bytes for one in tried) - 1) is None
    seconds, peak = math.inf, math.inf  # least of those within the limit
    rising = sorted((one.peak_bytes, one.seconds) for one in tried)
    for limit, of_limit in groupby(rising, key=lambda pair: pair[0]):
        seconds, peak = min((seconds, peak), min((own, limit) for _, own in of_limit))
        chosen = fitting(curve, limit)
        assert chosen is not None
        # Only a step that recomputes nothing may be in the curve beside a lower peak at no more seconds.
        assert chosen.seconds == seconds
        assert chosen.peak_bytes == peak or not chosen.segments


def test_the_search_through_everything_counts_right():
    units = [ChainStage(name, 1, 1) for name in "abcdefgh"]
    # Every second Fibonacci number: the ways to cut a row into segments that are kept, if single, or not.
    assert [len(set(all_choices(units[:num]))) for num in range(9)] == [1, 2, 5, 13, 34, 89, 233, 610, 1597]
    assert len({*all_choices([replace(units[0], parts=tuple(units[1:3])), NO_PEAK, units[3]])}) == 6 * 2


@st.composite
def chains(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[int],
    depth: int = 0,
    shared: str = "",
    live: int = 100,
    above: str = "m",
) -> tuple[ChainStage, ...]:
    """Chains with gaps and parts; ``shared`` has a letter for each name that there may be several times.

    Live bytes rise as they do in a step, so that there is much to choose, but only by and large.
    """
    chain: list[ChainStage] = []
    for i in range(draw(sizes)):
        name = draw(st.sampled_from([*[f"{above}.{i}"] * 4, *shared, *shared, None]))
        has_parts = depth > 0 and draw(st.booleans())
        inner = chains(st.integers(1, 3), depth - 1, shared, live, f"{above}.{i}")
        parts = draw(inner) if has_parts else ()
        output, internal, temporary, noise = (draw(st.integers(0, most)) for most in (30, 90, 20, 40))
        seconds = draw(st.integers(1, 40)) / 8  # sums of these are exact
        live += output + internal
        chain.append(
            ChainStage(
                name=name,
                forward_peak_bytes=live + temporary,
                backward_peak_bytes=live + noise,
                internal_bytes=internal,
                boundary_bytes=draw(st.integers(0, 30)),
                backward_start_bytes=live,
                own_peak_bytes=output + internal + temporary,
                seconds=seconds,
                tail_seconds=draw(st.integers(0, 8)) / 8,
                opening_bytes=draw(st.integers(0, 20)),
                parts=parts,
            )
        )
    return tuple(chain)


def traced(num: int, seed: int) -> list[ChainStage]:
    """A chain as the profile of a step has it: live bytes rise in forward and fall in backward."""
    rng = random.Random(seed)
    chain, live, inputs = [], 100, 100
    for i in range(num):
        output, internal, temporary = rng.randint(1, 30), rng.randint(0, 90), rng.randint(0, 20)
        live += output + internal
        chain.append(
            ChainStage(
                name=f"{i}",
                forward_peak_bytes=live + temporary,
                backward_peak_bytes=live + inputs + temporary,  # the gradients of both output and inputs
                internal_bytes=internal,
                boundary_bytes=inputs if i else 0,
                backward_start_bytes=live,  # without the output, but with its gradient
                own_peak_bytes=output + internal + temporary,
                seconds=rng.randint(1, 40) / 8,
            )
        )
        inputs = output
    return chain


@settings(max_examples=60, deadline=None)
@given(chains(st.integers(5, 8)))
def test_every_segmentation_of_up_to_8_items(chain: tuple[ChainStage, ...]):
    assert_is_the_front_of(pareto(chain), everything(chain), chain)


@settings(max_examples=40, deadline=None)
@given(chains(st.integers(2, 4), depth=2))
def test_every_choice_within_parts(chain: tuple[ChainStage, ...]):
    assert_is_the_front_of(pareto(chain), everything(chain), chain)


@settings(max_examples=300, deadline=None)
@given(chains(st.integers(2, 4), depth=1, shared="xyz"))
def test_every_choice_with_modules_that_are_called_several_times(chain: tuple[ChainStage, ...]):
    assert_is_the_front_of(pareto(chain), everything(chain), chain)


@pytest.mark.parametrize("seed", range(4))
def test_every_segmentation_of_a_traced_chain(seed: int):
    chain = traced(8, seed)
    curve = pareto(chain)
    assert_is_the_front_of(curve, everything(chain), chain)
    assert len(curve) > 8


@pytest.mark.parametrize("seed", range(4))
def test_every_subset_of_12_items(seed: int):
    units = traced(12, seed)
    # A gap in between keeps stages apart, so that the subsets are all there is.
    chain = [stage for unit in units for stage in (unit, NO_PEAK)]
    names = [str(unit.name) for unit in units]
    tried = [
        simulate(chain, [(name,) for name in some])
        for num in range(len(names) + 1)
        for some in combinations(names, num)
    ]
    assert len(tried) == 2**12
    assert_is_the_front_of(pareto(chain), tried, chain)


# --- Better than greed


def greedy(chain: Sequence[ChainStage], limit_bytes: int) -> CheckpointSchedule:
    """Recompute stages one by one, those that free most bytes per second first, until the step fits."""
    segments: list[tuple[str, ...]] = []
    for stage in sorted(chain, key=lambda stage: -stage.internal_bytes / max(stage.seconds, 1e-9)):
        if simulate(chain, segments).peak_bytes <= limit_bytes:
            break
        if stage.name is not None:
            segments.append((stage.name,))
    return simulate(chain, segments)


def test_greed_takes_the_cheapest_bytes_and_then_too_many():
    # 6 bytes for 1 second are the better bargain, but 10 bytes are needed, and 2 seconds free just those.
    chain = [
        ChainStage("a", 20, 20, internal_bytes=6, backward_start_bytes=20, own_peak_bytes=6, seconds=1.0),
        ChainStage("b", 30, 30, internal_bytes=10, backward_start_bytes=30, own_peak_bytes=10, seconds=2.0),
        ChainStage(None, 100, 100),
    ]
    assert greedy(chain, 90) == CheckpointSchedule(84, 3.0, (("a",), ("b",)))
    assert fitting(pareto(chain), 90) == CheckpointSchedule(90, 2.0, (("b",),))


def test_greed_overlooks_when_bytes_are_freed():
    # The cheapest bytes are those of the last stage, which are all back at the peak.
    chain = [replace(stage, seconds=seconds) for stage, seconds in zip(CHAIN, (1.0, 2.0, 0.5), strict=True)]
    assert greedy(chain, 90) == CheckpointSchedule(67, 3.5, (("c",), ("a",), ("b",)))
    assert fitting(pareto(chain), 90) == CheckpointSchedule(87, 2.0, (("b",),))


@pytest.mark.parametrize("seed", range(3))
def test_greed_is_never_better(seed: int):
    chain = traced(30, seed)
    curve = pareto(chain)
    extra = []
    for percent in range(95, 15, -5):
        limit = curve[0].peak_bytes * percent // 100
        greed, best = greedy(chain, limit), fitting(curve, limit)
        if greed.peak_bytes <= limit:
            assert best is not None
            assert best.seconds <= greed.seconds
            extra.append(greed.seconds / best.seconds)
    assert max(extra) > 1.2


# --- Modules that are called several times


def test_all_calls_of_a_module_are_recomputed_or_none():
    chain = (replace(CHAIN[0], name="x"), replace(CHAIN[1], name="x"), CHAIN[2])
    assert simulate(chain, [("x",)]) == CheckpointSchedule(67, 3.0, (("x",),))
    assert pareto(chain) == (CheckpointSchedule(117, 0.0, ()), CheckpointSchedule(67, 3.0, (("x",),)))


def siamese(num_blocks: int) -> list[ChainStage]:
    """An encoder of several blocks that is called twice."""
    units = traced(2 * num_blocks, 0)
    calls = []
    for call in (units[:num_blocks], units[num_blocks:]):
        blocks = tuple(replace(unit, name=f"encoder.{i}") for i, unit in enumerate(call))
        calls.append(
            ChainStage(
                name="encoder",
                forward_peak_bytes=max(block.forward_peak_bytes for block in blocks),
                backward_peak_bytes=max(block.backward_peak_bytes for block in blocks),
                internal_bytes=sum(block.internal_bytes for block in blocks)
                + sum(block.boundary_bytes for block in blocks[1:]),
                boundary_bytes=blocks[0].boundary_bytes,
                backward_start_bytes=blocks[-1].backward_start_bytes,
                own_peak_bytes=sum(block.own_peak_bytes for block in blocks),
                seconds=sum(block.seconds for block in blocks),
                parts=blocks,
            )
        )
    return calls


def test_few_modules_with_several_calls_are_tried_in_all_subsets():
    chain = siamese(2)
    assert_is_the_front_of(pareto(chain), everything(chain), chain)


def test_of_many_modules_with_several_calls_those_within_equally_many_go_together():
    chain = siamese(6)
    blocks = tuple((f"encoder.{i}",) for i in range(6))
    tried = [simulate(chain, segments) for segments in ((), (("encoder",),), blocks)]
    assert_is_the_front_of(pareto(chain), tried, chain)
    assert pareto(chain)[-1].segments == blocks


def test_a_module_called_several_times_within_one_block_is_decided_on_there():
    units = traced(12, 1)
    blocks = []
    for i in range(4):
        names = (f"{i}.relu", f"{i}.conv" if i % 2 else "dropout", f"{i}.relu")
        parts = [replace(one, name=name) for one, name in zip(units[3 * i : 3 * i + 3], names, strict=True)]
        blocks.append(replace(parts[-1], name=f"{i}", parts=tuple(parts)))
    # Five such modules are more than subsets are tried of in one place, but no place has more than one.
    assert_is_the_front_of(pareto(blocks), everything(blocks), blocks)


# --- Long chains


def test_what_is_thinned_stays_real_and_keeps_its_ends(monkeypatch: pytest.MonkeyPatch):
    chain = traced(48, 0)
    exact = pareto(chain)
    monkeypatch.setattr(pareto_schedules, "_MOST_PAIRS", 0)
    monkeypatch.setattr(pareto_schedules, "_LEAST_WIDTH", 50)
    thinned = pareto(chain)
    assert len(thinned) <= 51 < len(exact)
    assert thinned[0] == exact[0]
    assert thinned[-1].peak_bytes == exact[-1].peak_bytes
    assert all(simulate(chain, one.segments) == one for one in thinned)
    total = math.fsum(stage.seconds for stage in chain)
    slower = [
        chosen.seconds - one.seconds
        for one in exact
        if (chosen := fitting(thinned, one.peak_bytes)) is not None
    ]
    assert len(slower) == len(exact)
    assert min(slower) >= 0
    assert 0 < max(slower) < 0.1 * total


def test_long_chains_have_segments_of_a_greatest_length():
    # Nothing is worth keeping, so that segments are as long as they may be.
    chain = [ChainStage(f"{i}", 1000 + i, 0, 0, 1) for i in range(144)]
    assert max(len(names) for one in pareto(chain) for names in one.segments) == 24
    assert max(len(names) for one in pareto(chain[:128]) for names in one.segments) == 127


# --- The knee, and errors


def test_the_knee_is_the_least_product_of_peak_and_step_time():
    curve = [
        CheckpointSchedule(100, 0.0, ()),
        CheckpointSchedule(60, 2.0, ()),
        CheckpointSchedule(50, 4.0, ()),
        CheckpointSchedule(48, 8.0, ()),
    ]
    assert knee(curve, 10.0) == curve[2]  # 1000, 720, 700, 864
    assert knee(curve, 1.0) == curve[0]  # 100, 180, 250, 432
    assert knee(curve, 6.0) == curve[1]  # 600, 480, 500, 672
    assert knee([curve[0], CheckpointSchedule(50, 10.0, ())], 10.0) == curve[0]  # equal: less time


def test_the_knee_needs_choices_and_a_time():
    with pytest.raises(ValueError, match=r"`knee\(curve\)` must have at least one choice, but has none"):
        knee([], 1.0)
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"must be a time above 0, but got step_seconds={seconds!r}"):
            knee([CheckpointSchedule(1, 0.0, ())], seconds)


def test_nothing_fits_an_empty_curve():
    assert fitting((), 10) is None


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("d",)], "must name stages of the chain, but got 'd'"),
        ([(None,)], "must name stages of the chain, but got None"),
        ([("a",), ("a",)], "must name a stage once, but got 'a' again"),
        ([("a", "a")], "must name a stage once, but got 'a' again"),
        ([("a", "c")], r"follow each other directly in one chain, but got \('a', 'c'\)"),
        ([("c", "b")], r"follow each other directly in one chain, but got \('c', 'b'\)"),
        ([("b.x", "c")], r"follow each other directly in one chain, but got \('b.x', 'c'\)"),
        ([("b.x", "b.y")], r"follow each other directly in one chain, but got \('b.x', 'b.y'\)"),
        ([()], r"must be one stage, or stages that .*, but got \(\)"),
        ([("c", "s")], r"stages that are called once .*, but got \('c', 's'\)"),
        (
            [("b",), ("b.x",)],
            "must not name a stage within another one that it names, but got 'b.x' within 'b'",
        ),
        ([("b.x",), ("a", "b")], "but got 'b.x' within 'b'. Leave one of them out"),
    ],
)
def test_segments_that_cannot_be_recomputed(segments: list[tuple[str, ...]], message: str):
    parts = (ChainStage("b.x", 1, 1), NO_PEAK, ChainStage("b.y", 1, 1))
    chain = (CHAIN[0], replace(CHAIN[1], parts=parts), CHAIN[2], ChainStage("s", 1, 1), ChainStage("s", 1, 1))
    with pytest.raises(ValueError, match=message):
        simulate(chain, segments)


@pytest.mark.parametrize(
    ("field", "value"),
    [("internal_bytes", -3), ("forward_peak_bytes", -1), ("seconds", math.nan), ("seconds", math.inf)],
)
def test_numbers_that_no_step_has(field: str, value: float):
    given = f"{field}={value!r} for the stage 'b'"
    with pytest.raises(
        ValueError, match=rf"`ChainStage\({field}\)` must be a finite number .*, but got {given}"
    ):
        replace(CHAIN[1], **{field: value})
