"""How far the choice of what to recompute is from the best one, and how long choosing takes.

    python -m benchmarks.checkpoint_choice

Chains are random, like a transformer's (pairs of attention and MLP, all layers alike) or like a wide ResNet's
(three stages, each with half of the bytes of the one before). Five questions:

exhaustive: the curve against every segmentation of 10 items and every subset of 12.
integer programme: choices at four limits against what HiGHS proves to be the fastest ones, for single items
    in chains of 20 to 200 and for segments in chains of 20 and 30.
slots: choices at every limit against a dynamic programme over slots of memory, which is exact since the sizes
    of its chains are whole slots.
nesting: choices against the optimal schedule of a chain, which may recompute within what it recomputes
    (Beaumont et al., Optimal checkpointing for heterogeneous chains, 2019, arXiv:1911.13214). It reaches
    lower peaks; times are compared at limits that both reach.
time: seconds that choosing takes for chains with all different bytes.

Gaps are shares of a step, taken as three times the forward pass: 0.01 is a step that takes 1 % longer.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.checkpoint_optima import Slots, Stage, integer_optimum, least_slots
from benchmarks.results_file import write_results
from lightning_memtrain.checkpointing.selection.pareto_schedules import fitting, pareto
from lightning_memtrain.checkpointing.selection.step_chain import ChainStage, CheckpointSchedule, simulate

KINDS = ("random", "transformer", "wide resnet")
STEP_OVER_FORWARD = 3
MEBIBYTE = 2**20


def make_stages(kind: str, num: int, seed: int, unit: float) -> list[Stage]:
    """Stages with sizes in numbers of about ``unit``; with a large one they all differ."""
    rng = random.Random(f"{kind} {num} {seed}")

    def size(low: float, high: float) -> int:
        return round(unit * rng.uniform(low, high))

    stages = []
    for i in range(num):
        if kind == "random":
            row = (size(1, 6), size(0, 12), size(0, 2), size(0, 4), rng.randint(1000, 40000))
        elif kind == "transformer":
            internal, seconds = ((8, 10000), (11, 16000))[i % 2]
            row = (size(2, 2), size(internal, internal), size(1, 1), size(2, 2), seconds)
        else:
            share = 2.0 ** -(3 * i // num)
            sizes = (size(8 * share, 8 * share), size(16 * share, 24 * share))
            row = (*sizes, 0, size(4 * share, 8 * share), 20000)
        output, internal, forward, backward, seconds = row
        output = max(1, output)
        stages.append(Stage(output, output + internal, forward, backward, seconds))
    return stages


def items_of(stages: Sequence[Stage]) -> list[ChainStage]:
    """The profile of the chain's step; its input is not counted, and the last stage, the loss, is a gap."""
    items, live, inputs = [], 0, 0
    for i, stage in enumerate(stages):
        is_loss = i == len(stages) - 1
        gradient = 0 if is_loss else stage.output
        live += stage.saved
        items.append(
            ChainStage(
                name=None if is_loss else f"{i}",
                forward_peak_bytes=live + stage.forward_temporary,
                backward_peak_bytes=live + gradient + inputs + stage.backward_temporary,
                internal_bytes=stage.saved - stage.output,
                boundary_bytes=inputs,
                # Its output is gone by then, if it comes from a stage that is yet to run again.
                backward_start_bytes=live - stage.output + gradient,
                own_peak_bytes=stage.saved + stage.forward_temporary,
                seconds=stage.seconds,
            )
        )
        inputs = stage.output
    return items


def single(items: Sequence[ChainStage]) -> list[ChainStage]:
    """The chain with a gap between any two items, so that each can be recomputed only by itself."""
    return [part for item in items for part in (item, ChainStage(None, 0, 0))]


# ------------------------------------------------------------------ every choice


def segmentations(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    if not names:
        yield ()
        return
    for rest in segmentations(names[1:]):
        yield rest
    for length in range(1, len(names) + 1):
        for rest in segmentations(names[length:]):
            yield (tuple(names[:length]), *rest)


def subsets(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    for num in range(len(names) + 1):
        for some in itertools.combinations(names, num):
            yield tuple((name,) for name in some)


def exhaustive_rows() -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        for what, num, choices in (("segments", 10, segmentations), ("single items", 12, subsets)):
            items = items_of(make_stages(kind, num + 1, 0, MEBIBYTE))
            names = [item.name for item in items if item.name is not None]
            chain = items if what == "segments" else single(items)
            tried = [simulate(chain, segments) for segments in choices(names)]
            curve = pareto(chain)
            best = {
                limit: min(one.seconds for one in tried if one.peak_bytes <= limit)
                for limit in {one.peak_bytes for one in curve} | {one.peak_bytes for one in tried[::97]}
                if limit >= curve[-1].peak_bytes
            }
            gaps = [added(curve, limit) - seconds for limit, seconds in best.items()]
            reaches = curve[-1].peak_bytes == min(one.peak_bytes for one in tried)
            rows.append(
                {"chain": f"{kind}, {num} items", "choices": what, "tried": len(tried), "limits": len(best)}
                | shares(gaps, items)
                | {"same_least_peak": reaches}
            )
    return rows


def added(curve: Sequence[CheckpointSchedule], limit_bytes: float) -> float:
    choice = fitting(curve, math.floor(limit_bytes))
    assert choice is not None
    return choice.seconds


def shares(gaps: Sequence[float], items: Sequence[ChainStage]) -> dict[str, float]:
    step = STEP_OVER_FORWARD * sum(item.seconds for item in items)
    return {
        "median_gap": float(f"{statistics.median(gaps) / step:.2e}"),
        "worst_gap": float(f"{max(gaps) / step:.2e}"),
    }


# ------------------------------------------------------------------ integer programmes


def integer_rows(seconds: float) -> list[dict[str, Any]]:
    rows = []
    sizes = {"single items": (20, 50, 100, 200), "segments": (20, 30)}
    for kind, (what, nums) in itertools.product(KINDS, sizes.items()):
        for num in nums:
            items = items_of(make_stages(kind, num + 1, 0, MEBIBYTE))
            curve = pareto(items if what == "segments" else single(items))
            most, least = curve[0].peak_bytes, curve[-1].peak_bytes
            gaps = []
            for share in (0.1, 0.3, 0.5, 0.7):
                limit = round(least + share * (most - least))
                best, bound = integer_optimum(items, num if what == "segments" else 1, limit, seconds)
                # Times are whole numbers. The solver lets a limit be passed by a millionth.
                if best is not None and best.seconds - bound < 0.5 and best.peak_bytes <= limit * (1 + 1e-6):
                    gaps.append(added(curve, limit) - best.seconds)
            rows.append(
                {"chain": f"{kind}, {num} items", "choices": what, "limits": 4, "proved_optima": len(gaps)}
                | (shares(gaps, items) if gaps else {"median_gap": None, "worst_gap": None})
            )
            print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------ dynamic programmes over memory slots


def slot_rows() -> list[dict[str, Any]]:
    rows = []
    for kind, num in itertools.product(KINDS, (50, 100, 200, 300)):
        stages = make_stages(kind, num + 1, 0, 1.0)
        items = items_of(stages)
        curve = pareto(items)
        flat = Slots(stages, curve[0].peak_bytes).flat() - sum(stage.seconds for stage in stages)
        limits = range(curve[-1].peak_bytes, curve[0].peak_bytes + 1)
        gaps = [added(curve, limit) - float(flat[limit]) for limit in limits]
        assert min(gaps) >= 0  # these choices are among those of the dynamic programme
        rows.append(
            {"chain": f"{kind}, {num} items", "limits": len(limits)}
            | shares(gaps, items)
            | {
                "least_peak": round(curve[-1].peak_bytes / curve[0].peak_bytes, 4),
                "least_peak_of_optimum": round(least_slots(flat) / curve[0].peak_bytes, 4),
            }
        )
        print(rows[-1], flush=True)
    return rows


def nesting_rows() -> list[dict[str, Any]]:
    rows = []
    chains = [(kind, num, 0, 1.0) for kind in KINDS for num in (12, 25, 50, 100)]
    chains += [("random", num, seed, 1.0) for num in (12, 25, 50) for seed in (1, 2, 3)]
    chains += [("random", 200, 0, 0.3)]
    for kind, num, seed, unit in chains:
        stages = make_stages(kind, num + 1, seed, unit)
        items = items_of(stages)
        curve = pareto(items)
        nested = Slots(stages, curve[0].peak_bytes).nested() - sum(stage.seconds for stage in stages)
        limits = range(curve[-1].peak_bytes, curve[0].peak_bytes + 1)
        gaps = [added(curve, limit) - float(nested[limit]) for limit in limits]
        assert min(gaps) >= 0  # these choices are among those of the dynamic programme
        more = [gap / float(nested[limit]) for gap, limit in zip(gaps, limits, strict=True) if nested[limit]]
        rows.append(
            {
                "chain": f"{kind}, {num} items, seed {seed}",
                "limits": len(limits),
                "slower_at": round(sum(gap > 0 for gap in gaps) / len(gaps), 3),
                **shares(gaps, items),
                "median_more_added_time": round(statistics.median(more), 4),
                "worst_more_added_time": round(max(more), 4),
                "least_peak": round(curve[-1].peak_bytes / curve[0].peak_bytes, 3),
                "least_peak_nested": round(least_slots(nested) / curve[0].peak_bytes, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------ time


def time_rows() -> list[dict[str, Any]]:
    rows = []
    for kind, num in itertools.product(KINDS, (12, 25, 50, 100, 200, 300)):
        items = items_of(make_stages(kind, num + 1, 0, MEBIBYTE))
        spent = []
        for _ in range(3):
            began = time.perf_counter()
            curve = pareto(items)
            spent.append(time.perf_counter() - began)
        rows.append({"chain": f"{kind}, {num} items", "seconds": round(min(spent), 3), "choices": len(curve)})
    return rows


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    texts = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]
    return "\n".join(["", title, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver-seconds", type=float, default=2.0, help="most time of an integer programme")
    options = parser.parse_args()
    results = {
        "exhaustive": exhaustive_rows(),
        "integer_programme": integer_rows(options.solver_seconds),
        "slots": slot_rows(),
        "nesting": nesting_rows(),
        "time": time_rows(),
    }
    for title, rows in results.items():
        print(table(title, rows))
    write_results("checkpoint_choice", results)


if __name__ == "__main__":
    main()
