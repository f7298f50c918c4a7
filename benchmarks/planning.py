"""Plans beside what they lead to: peaks of the allocator, times of steps, a grid, and the ways of others.

    python -m benchmarks.planning bytes [--models NAME...] [--write NAME]
    python -m benchmarks.planning grid  [--models NAME...] [--write NAME]
    python -m benchmarks.planning times [--models NAME...] [--limits INDEX...] [--mib MIB...] [--write NAME]
    python -m benchmarks.planning peers [--models NAME...] [--write NAME]

``bytes`` plans for five limits of each model, at even steps from 80 % of what the run needs as it is down to
the least that a plan finds, and runs each chosen way for real: the allocator's peak beside the prediction.
``grid`` runs microbatch sizes and recomputation policies for real. ``times`` does what ``bytes`` does, and in
turn steps the plain run, the chosen way and the fastest of the grid that keep the limit; times are processor
seconds of one thread, and a ratio is the median over rounds. ``peers`` does the same with other ways to need
less, at the limit that each of them keeps.

With ``--write`` rows go to results/NAME.json as they come; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.planning_models import MODELS
from benchmarks.planning_runs import Make, arguments_of, peak_bytes, ratios, seconds_in_turn
from benchmarks.results_file import RESULTS, write_results
from lightning_memtrain import ActivationCheckpointing, Microbatching
from lightning_memtrain.core import MIB
from lightning_memtrain.planning.fit.search import search
from lightning_memtrain.planning.fit.way import FoundWays, Way
from lightning_memtrain.tracing.device import Device

ALLOWED = ("batchnorm-statistics",)
NUM_LIMITS = 5
_MOST = 0.8
# Up to so many bytes each, all ways may be there at once.
_SIDE_BY_SIDE_BYTES = 2**29
_ROUNDS, _ROUNDS_OF_LARGE = 5, 2
_OF_GRID = 3

Row = dict[str, Any]


class Rows:
    """Rows in a file, in which a new run goes on."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        file = RESULTS / f"{name}.json"
        self.rows: list[Row] = json.loads(file.read_text())["results"] if name and file.exists() else []

    def find(self, **key: Any) -> Row | None:
        """The row with these values."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def of(self, measure: Callable[[], Row], **key: Any) -> Row:
        """The row, measured if it is not there."""
        found = self.find(**key)
        if found is None:
            found = {**key, **measure()}
            self.rows.append(found)
            print(found, flush=True)
            if self._name:
                write_results(self._name, self.rows)
        return found


def _search(name: str, limit_bytes: int, allow: tuple[str, ...] = ALLOWED) -> FoundWays:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return search(model, batch, device=Device.named("cpu"), limit_bytes=limit_bytes, allow=allow)


def _plain() -> dict[str, Any]:
    return {}


def ends(name: str) -> Row:
    """What the run needs as it is, and the least that a plan finds."""
    peak = peak_bytes(name, _plain)
    torch.manual_seed(0)
    model, _ = MODELS[name]()
    weights = sum(one.nbytes for one in model.parameters())
    found = _search(name, weights)
    floor = found.floor.way.allocated_bytes
    assert floor is not None
    return {
        "plain_bytes": peak,
        "predicted_plain_bytes": found.plain.allocated_bytes,
        "floor_bytes": floor,
        "floor": str(found.floor.way),
    }


def limit_of(ends_row: Row, index: int) -> int:
    """The limit with that number."""
    plain, floor = ends_row["plain_bytes"], ends_row["floor_bytes"]
    most = max(_MOST * plain, (plain + floor) / 2)
    return int(floor + (most - floor) * (NUM_LIMITS - 1 - index) / (NUM_LIMITS - 1))


def bytes_row(name: str, limit_bytes: int) -> Row:
    """A plan for a limit, and the peak of its way."""
    start = time.perf_counter()
    found = _search(name, limit_bytes)
    row: Row = {
        "limit_mib": round(limit_bytes / MIB, 2),
        "plan_seconds": round(time.perf_counter() - start, 1),
        "way": None if found.chosen is None else str(found.chosen),
    }
    return row if found.chosen is None else row | _bytes(name, found.chosen, limit_bytes)


def _bytes(name: str, way: Way, limit_bytes: int) -> Row:
    peak = peak_bytes(name, arguments_of(way))
    assert way.allocated_bytes is not None
    return {
        "predicted_mib": round(way.allocated_bytes / MIB, 2),
        "real_mib": round(peak / MIB, 2),
        "keeps_limit": peak <= limit_bytes,
        "off_percent": round(100 * (way.allocated_bytes / peak - 1), 2),
    }


def _by_hand(size: int | None, policy: str | None) -> dict[str, Any]:
    callbacks: list[Any] = [] if size is None else [Microbatching(microbatch_size=size)]
    return {"callbacks": callbacks if policy is None else [*callbacks, ActivationCheckpointing(policy)]}


def _grid(name: str) -> dict[str, Make]:
    model, batch = MODELS[name]()
    sizes: dict[int | None, None] = {None: None}
    count = 2
    while model.automatic_optimization and count <= len(batch[0]):
        sizes[-(-len(batch[0]) // count)] = None
        count *= 2
    return {
        f"{size or 'all'}, {policy or 'kept'}": partial(_by_hand, size, policy)
        for size, policy in itertools.product(sizes, (None, "sqrt", "full"))
    }


def grid_row(name: str, way: str) -> Row:
    """One way of the grid, run for real; seconds are only to choose by."""
    make = _grid(name)[way]
    seconds = seconds_in_turn(name, {way: make}, 1, side_by_side=False)[way][0]
    return {"peak_bytes": peak_bytes(name, make), "seconds": round(seconds, 3)}


def times_row(name: str, limit_bytes: int, rows: Rows, allow: tuple[str, ...] = ALLOWED) -> Row:
    """The plain run, the chosen way and the best of the grid, in turn."""
    start = time.perf_counter()
    found = _search(name, limit_bytes, allow)
    plan_seconds = time.perf_counter() - start
    row: Row = {
        "limit_mib": round(limit_bytes / MIB, 2),
        "plan_seconds": round(plan_seconds, 1),
        "way": None if found.chosen is None else str(found.chosen),
    }
    if found.chosen is None or found.chosen.is_plain:
        return row
    row |= _bytes(name, found.chosen, limit_bytes)
    ways: dict[str, Make] = {"plain": _plain, "chosen": arguments_of(found.chosen)}
    grid = [one for one in rows.rows if one["kind"] == "grid" and one["model"] == name]
    fitting = sorted(
        (one for one in grid if one["peak_bytes"] <= limit_bytes), key=lambda one: float(one["seconds"])
    )
    ways |= {one["way"]: _grid(name)[one["way"]] for one in fitting[:_OF_GRID]}
    is_small = (found.plain.allocated_bytes or 0) <= _SIDE_BY_SIDE_BYTES
    spent = seconds_in_turn(name, ways, _ROUNDS if is_small else _ROUNDS_OF_LARGE, side_by_side=is_small)
    real = ratios(spent)
    predicted = found.chosen.time_ratio
    assert predicted is not None
    row |= {
        "plain_seconds": [round(one, 3) for one in spent["plain"]],
        "predicted_time": round(predicted, 3),
        "real_time": round(real["chosen"], 3),
        "off_by": round(predicted - real["chosen"], 3),
        "grid_fits": len(fitting),
        "grid": {key: round(value, 3) for key, value in real.items() if key not in ("plain", "chosen")},
    }
    best = min(row["grid"].items(), key=lambda one: one[1], default=None)
    if best is not None:
        row |= {"best_of_grid": best[0], "over_best": round(real["chosen"] / best[1] - 1, 3)}
    return row


def _checkpointed(model: Any) -> None:
    model.net.gradient_checkpointing_enable({"use_reentrant": False})
    model.net.train()


def _peers(name: str) -> dict[str, Make]:
    model, batch = MODELS[name]()
    size = len(batch[0])
    found: dict[str, Make] = {}
    if model.automatic_optimization:
        for count in (4, 16):
            if size % count == 0:
                found[f"accumulate_grad_batches={count}, batches of {size // count}"] = partial(
                    dict, accumulate_grad_batches=count, batch_size=size // count
                )
    if hasattr(model.net if hasattr(model, "net") else model, "gradient_checkpointing_enable"):
        found["gradient checkpointing of transformers"] = partial(dict, prepare=_checkpointed)
    return found


def peers_row(name: str, peer: str) -> Row:
    """Another way to need less, and a plan within what it needs."""
    make = _peers(name)[peer]
    limit_bytes = peak_bytes(name, make)
    found = _search(name, limit_bytes)
    row: Row = {
        "limit_mib": round(limit_bytes / MIB, 2),
        "way": None if found.chosen is None else str(found.chosen),
    }
    if found.chosen is not None:
        is_small = (found.plain.allocated_bytes or 0) <= _SIDE_BY_SIDE_BYTES
        ways: dict[str, Make] = {"plain": _plain, "peer": make, "chosen": arguments_of(found.chosen)}
        spent = seconds_in_turn(name, ways, _ROUNDS if is_small else _ROUNDS_OF_LARGE, side_by_side=is_small)
        real = ratios(spent)
        row |= {"time": round(real["chosen"], 3), "time_of_peer": round(real["peer"], 3)}
    return row


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["bytes", "grid", "times", "peers"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--limits", nargs="*", type=int, default=list(range(NUM_LIMITS)), metavar="INDEX")
    parser.add_argument("--mib", nargs="*", type=float, default=[], help="limits for `times`, beside")
    parser.add_argument("--allow", nargs="*", default=[], help="what else may be used for `--mib`")
    parser.add_argument("--write", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.write)
    for name in arguments.models:
        if arguments.what == "grid":
            for way in _grid(name):
                rows.of(partial(grid_row, name, way), kind="grid", model=name, way=way)
            continue
        if arguments.what == "peers":
            for peer in _peers(name):
                rows.of(partial(peers_row, name, peer), kind="peers", model=name, peer=peer)
            continue
        row = rows.of(partial(ends, name), kind="ends", model=name)
        for index in arguments.limits:
            limit = limit_of(row, index)
            measure = (
                partial(bytes_row, name, limit)
                if arguments.what == "bytes"
                else partial(times_row, name, limit, rows)
            )
            rows.of(measure, kind=arguments.what, model=name, limit=index)
        for mib in arguments.mib if arguments.what == "times" else []:
            allow = (*ALLOWED, *arguments.allow)
            measure = partial(times_row, name, int(mib * MIB), rows, allow)
            rows.of(measure, kind="times", model=name, limit=f"{mib} MiB", allow=arguments.allow)


if __name__ == "__main__":
    main()
