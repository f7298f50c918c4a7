"""What a study runs: the grid file, read and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_memtrain.study.templates import expand_templates

#: Who asks for what every run has.
BASE = "base"


@dataclass(frozen=True)
class Score:
    """By what runs are compared, beside memory and time.

    Args:
        metric: name under which the recipe logs it; one that begins with ``test/`` has each run tested.
        mode: whether more or less of it is better.
        percent: whether it is a fraction that is shown as percent.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    percent: bool = False

    def shown(self, value: float) -> float:
        """The value as it is shown: in percent if it is a fraction."""
        return 100 * value if self.percent else value

    @property
    def label(self) -> str:
        """The metric with its unit."""
        return f"{self.metric} (%)" if self.percent else self.metric


@dataclass(frozen=True)
class Layer:
    """What is laid over a recipe's configuration.

    Args:
        recipe_variants: variants that the recipe has itself.
        config: a piece of a LightningCLI configuration.
    """

    recipe_variants: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One setting that is run with several seeds.

    Args:
        name: unique in the study, and the beginning of its runs' names.
        layer: what it lays over the base; that of a combination is empty.
        technique: which technique it is a strength of, for figures; ``""`` for none.
        strength: how strong, e.g. a sparsity; ``None`` where there is only one.
        members: the variants that it is a combination of; none for a variant of its own.
        seeds: its seeds; ``None`` for those of the study.
    """

    name: str
    layer: Layer = field(default_factory=Layer)
    technique: str = ""
    strength: int | float | str | None = None
    members: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Grid:
    """All that a study runs.

    Args:
        variants: the baseline, the single settings and the combinations, in the order of the file.
        baseline: name of the variant that the others are compared with.
        base: what every run lays over the recipe.
        seeds: of every variant that has none of its own.
        seed_keys: options that are set to the seed.
        score: by what runs are compared; ``None`` for memory and time only.
        recipe: name of the recipe that the grid was written for; ``None`` for any.
    """

    variants: tuple[Variant, ...]
    baseline: str
    base: Layer = field(default_factory=Layer)
    seeds: tuple[int, ...] = (1, 2, 3)
    seed_keys: tuple[str, ...] = ("seed_everything",)
    score: Score | None = None
    recipe: str | None = None

    def variant(self, name: str) -> Variant:
        """The variant of a name.

        Args:
            name: one of the grid's.

        Returns:
            The variant.

        Raises:
            ValueError: if there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = [variant.name for variant in self.variants]
        raise ValueError(f"the grid has no variant `{name}`.{nearest(name, known)}")

    def layers(self, variant: Variant) -> dict[str, Layer]:
        """What a variant's runs lay over the recipe, by who asks for it, the base first."""
        members = [self.variant(name) for name in variant.members] or [variant]
        return {BASE: self.base, **{member.name: member.layer for member in members}}


def read_grid(data: object) -> Grid:
    """Check a grid as it was read from YAML.

    Args:
        data: the content of the file.

    Returns:
        The grid, templates expanded.

    Raises:
        ValueError: if something of it is wrong; the message says what, and what may have been meant.
    """
    top = _mapping(data, "the grid")
    _refuse_unknown(top, _TOP, "the grid")
    variants = [
        _variant(name, entry)
        for name, entry in expand_templates(_mapping(top.get("variants"), "`variants`")).items()
    ]
    if not variants:
        raise ValueError("the grid has no `variants`; give at least one, such as `plain: {}`.")
    singles = [variant.name for variant in variants]
    for name, entry in _mapping(top.get("combinations"), "`combinations`").items():
        if name in singles:
            raise ValueError(f"`combinations.{name}` has the name of a variant; name it otherwise.")
        variants.append(_combination(name, entry, singles))
    baseline = top.get("baseline", singles[0])
    if baseline not in singles:
        raise ValueError(
            f"`baseline: {baseline}` is none of the `variants`.{nearest(str(baseline), singles)}"
        )
    return Grid(
        variants=tuple(variants),
        baseline=baseline,
        base=_layer(_mapping(top.get("base"), "`base`"), "base"),
        seeds=check_seeds(top.get("seeds", 3), "seeds"),
        seed_keys=_names(top.get("seed_keys", ["seed_everything"]), "seed_keys"),
        score=_score(top.get("score")),
        recipe=top.get("recipe"),
    )


def check_seeds(value: object, where: str) -> tuple[int, ...]:
    """Read how many seeds there are, or which.

    Args:
        value: a count, for the seeds 1, 2, 3, ..., or a list of seeds.
        where: what the user has written, for the error.

    Returns:
        The seeds.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> check_seeds(2, "seeds"), check_seeds([7, 5], "seeds")
        ((1, 2), (7, 5))
    """
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SEEDS:
        return tuple(range(1, value + 1))
    if isinstance(value, list) and value:
        whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in value)
        if whole and len(set(value)) == len(value):
            return tuple(value)
    raise ValueError(
        f"`{where}` must be a number of seeds from 1 to {MAX_SEEDS}, or a list of different seeds, each a "
        f"whole number of at least 0, but got {value!r}."
    )


#: More runs of one setting than this are a slip of the finger.
MAX_SEEDS = 100


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence, with a space before it, that names the nearest known word; nothing if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean `{found[0]}`?" if found else ""


_TOP = ("recipe", "score", "seeds", "seed_keys", "base", "baseline", "variants", "combinations")
_LAYER = ("recipe_variants", "config")
_VARIANT = (*_LAYER, "technique", "strength", "seeds")


def _variant(name: str, entry: object) -> Variant:
    where = f"variants.{name}"
    given = _mapping(entry, f"`{where}`")
    _refuse_unknown(given, _VARIANT, f"`{where}`")
    _check_name(name, where)
    strength = given.get("strength")
    if isinstance(strength, bool) or not isinstance(strength, (int, float, str, type(None))):
        raise ValueError(f"`{where}.strength` must be a number or a word, but got {strength!r}.")
    return Variant(
        name=name,
        layer=_layer({key: given[key] for key in _LAYER if key in given}, where),
        technique=str(given.get("technique", "")),
        strength=strength,
        seeds=check_seeds(given["seeds"], f"{where}.seeds") if "seeds" in given else None,
    )


def _combination(name: str, entry: object, singles: list[str]) -> Variant:
    where = f"combinations.{name}"
    given = {"of": entry} if isinstance(entry, list) else _mapping(entry, f"`{where}`")
    _refuse_unknown(given, ("of", "seeds"), f"`{where}`")
    _check_name(name, where)
    members = _names(given.get("of"), f"{where}.of")
    for member in members:
        if member not in singles:
            raise ValueError(f"`{where}` names the unknown variant `{member}`.{nearest(member, singles)}")
    if len(set(members)) < 2 or len(set(members)) < len(members):
        raise ValueError(f"`{where}` must name at least two different variants, but got {list(members)}.")
    seeds = check_seeds(given["seeds"], f"{where}.seeds") if "seeds" in given else None
    return Variant(name=name, members=members, seeds=seeds)


def _layer(given: Mapping[str, Any], where: str) -> Layer:
    _refuse_unknown(given, _LAYER, f"`{where}`")
    names = given.get("recipe_variants", [])
    names = _names([names] if isinstance(names, str) else names, f"{where}.recipe_variants")
    return Layer(names, _mapping(given.get("config"), f"`{where}.config`"))


def _score(given: object) -> Score | None:
    if given is None:
        return None
    entry = {"metric": given} if isinstance(given, str) else _mapping(given, "`score`")
    _refuse_unknown(entry, ("metric", "mode", "percent"), "`score`")
    metric, mode, percent = entry.get("metric"), entry.get("mode", "max"), entry.get("percent", False)
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"`score.metric` must be the name of a logged metric, but got {metric!r}.")
    if mode not in ("max", "min"):
        raise ValueError(f"`score.mode` must be max or min, but got {mode!r}.")
    if not isinstance(percent, bool):
        raise ValueError(f"`score.percent` must be true or false, but got {percent!r}.")
    return Score(metric, "max" if mode == "max" else "min", percent)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values, but got {value!r}.")
    return {str(key): entry for key, entry in value.items()}


def _names(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"`{where}` must be a list of names, but got {value!r}.")
    return tuple(value)


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has the unknown key `{key}`.{nearest(key, known)}")


def _check_name(name: str, where: str) -> None:
    """Names are parts of file names."""
    if (
        not name
        or name == BASE
        or not all(part.isalnum() or part in "-_.+" for part in name)
        or name[0] in ".-"
    ):
        raise ValueError(
            f"`{where}` must be a name of letters, digits and any of `-_.+` that begins with a letter or a "
            f"digit and is not `{BASE}`, because its runs' folders are named after it."
        )
