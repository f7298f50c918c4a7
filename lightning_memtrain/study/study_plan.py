"""The runs of a study, each with its whole configuration, and how two plans differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_memtrain.study.grid import Grid

_KIND = "lightning_memtrain study plan"
_MISSING = object()
#: So many differences are named; more do not help.
MAX_NAMED = 5


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed.

    Args:
        name: of its folder.
        variant: name of the variant.
        seed: of its random numbers.
        config: what is laid over the recipe's configuration, the seed included.
    """

    name: str
    variant: str
    seed: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study.

    Args:
        recipe: name of the recipe.
        runs: in the order in which they begin: the first seed of every variant, then the second, ...
    """

    recipe: str
    runs: tuple[PlannedRun, ...]

    def only(
        self, variants: Sequence[str] = (), seeds: Sequence[int] = (), names: Sequence[str] = ()
    ) -> StudyPlan:
        """The runs of some variants and seeds, or of some names; none given is all."""
        chosen = (
            run
            for run in self.runs
            if (not variants or run.variant in variants)
            and (not seeds or run.seed in seeds)
            and (not names or run.name in names)
        )
        return replace(self, runs=tuple(chosen))

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        runs = {
            run.name: {"variant": run.variant, "seed": run.seed, "config": run.config} for run in self.runs
        }
        return json.dumps({"kind": _KIND, "recipe": self.recipe, "runs": runs}, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> StudyPlan:
        """Read what :meth:`to_json` made.

        Args:
            path: of the file.

        Returns:
            The plan.

        Raises:
            ValueError: if it is none.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["kind"] != _KIND:
                raise KeyError(f"kind={data['kind']!r}")
            return cls(data["recipe"], tuple(PlannedRun(name, **run) for name, run in data["runs"].items()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`{path}` is no plan of a study ({type(error).__name__}: {error}).") from error


def plan_study(recipe: str, grid: Grid, overlays: Mapping[str, Mapping[str, Any]]) -> StudyPlan:
    """Make the runs of a grid.

    Args:
        recipe: name of the recipe.
        grid: what to run.
        overlays: what each variant lays over the recipe's configuration, the base included.

    Returns:
        The plan.
    """
    seeds_of = {variant.name: variant.seeds or grid.seeds for variant in grid.variants}
    rounds = max(map(len, seeds_of.values()))
    runs = [
        PlannedRun(
            f"{name}-seed{seeds[index]}", name, seeds[index], _seeded(overlays[name], seeds[index], grid)
        )
        for index in range(rounds)
        for name, seeds in seeds_of.items()
        if index < len(seeds)
    ]
    return StudyPlan(recipe, tuple(runs))


def differences(earlier: StudyPlan, later: StudyPlan) -> list[str]:
    """Say why the runs of one plan cannot stand beside those of another.

    A later plan may have more variants and more seeds. What both have must be the same.

    Args:
        earlier: of runs that there are.
        later: of runs that are to be added.

    Returns:
        A sentence for each difference; none if the later plan goes on with the earlier one.
    """
    if earlier.recipe != later.recipe:
        return [f"the recipe is `{later.recipe}`, but was `{earlier.recipe}`"]
    planned = {run.name: run for run in later.runs}
    found: list[str] = []
    for run in earlier.runs:
        if run.name not in planned:
            found.append(f"the run `{run.name}` is no longer asked for")
            continue
        for key, before, now in _changes(run.config, planned[run.name].config):
            sentence = f"`{key}` of `{run.variant}` is {_short(now)}, but was {_short(before)}"
            if sentence not in found:  # once, and not for each seed
                found.append(sentence)
    return found


def name_differences(found: list[str]) -> str:
    """The first of :func:`differences` in one sentence, and how many more there are."""
    more = len(found) - MAX_NAMED
    return "; ".join(found[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _seeded(overlay: Mapping[str, Any], seed: int, grid: Grid) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(overlay))
    for key in grid.seed_keys:
        place = config
        *outer, last = key.split(".")
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = seed
    return config


def _changes(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations differ, as dotted keys."""
    if isinstance(before, Mapping) and now is _MISSING:
        now = {}
    if isinstance(now, Mapping) and before is _MISSING:
        before = {}
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            inner = f"{key}.{name}" if key else str(name)
            yield from _changes(before.get(name, _MISSING), now.get(name, _MISSING), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _changes(one, other, f"{key}[{index}]")
    elif before != now:
        yield key, before, now


def _short(value: Any) -> str:
    if value is _MISSING:
        return "not set"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
