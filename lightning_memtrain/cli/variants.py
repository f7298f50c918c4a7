"""Several variants of a recipe as one configuration that is laid over it.

LightningCLI lays one file over another, and a list that is set anew takes the place of the one before it:
of two variants with callbacks, the first would be dropped without a word. Here, lists of objects add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning_memtrain
from lightning_memtrain.cli.errors import CommandError

Key = tuple[str, ...]

# Lists of objects also where a variant gives a single one, or only names.
_LISTS: tuple[Key, ...] = (("trainer", "callbacks"), ("trainer", "plugins"))
# Of these a run has one, so that a second one would undo what the first variant is for.
_SINGLE: tuple[Key, ...] = (("trainer", "strategy"), ("trainer", "precision"))


@dataclass(frozen=True)
class Overlay:
    """What several variants set together, to be laid over a recipe.

    Args:
        config: a configuration of LightningCLI, for after the recipe's.
        remarks: a sentence for each value that one variant sets and a later one sets otherwise.
    """

    config: dict[str, Any]
    remarks: list[str]


def merge_variants(
    recipe: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    plan: Mapping[str, Any] | None = None,
) -> Overlay:
    """Make one configuration of several variants.

    Lists of objects, such as ``trainer.callbacks``, add up: ``callbacks+`` extends the recipe's list,
    ``callbacks`` takes its place, and either is joined with those of all other variants, in any order of
    variants. What two of them have in common is there once. Of other values the last one counts.

    Args:
        recipe: the recipe's own configuration.
        variants: configurations by name, the first one first.
        plan: what a plan sets, which a variant must not set otherwise.

    Returns:
        What is to be laid over the recipe.

    Raises:
        CommandError: if two variants set one plugin, one technique or the strategy, each in another way.

    Example:
        >>> recipe = {"trainer": {"callbacks": ["MemoryProfiler"]}}
        >>> one = {"trainer": {"callbacks+": ["EarlyStopping"], "max_steps": 5}}
        >>> other = {"trainer": {"callbacks": ["Timer"], "max_steps": 6}}
        >>> overlay = merge_variants(recipe, {"one": one, "other": other})
        >>> overlay.config
        {'trainer': {'callbacks': ['Timer', 'EarlyStopping'], 'max_steps': 6}}
        >>> overlay.remarks
        ['`trainer.max_steps` is 6 by variant `other`; variant `one` has 5.']
    """
    merged = _Merged(recipe)
    for name, config in variants.items():
        merged.add(f"variant `{name}`", config, ())
    if plan:
        merged.add("the plan", plan, ())
    for key, entries in merged.lists.items():
        merged.set_list(key, entries)
    return Overlay(merged.config, merged.remarks)


@dataclass
class _List:
    """Entries of one list with those who asked for them: in the place of the recipe's, and besides."""

    instead: list[tuple[str, Any]] = field(default_factory=list)
    added: list[tuple[str, Any]] = field(default_factory=list)
    replaced: bool = False


@dataclass
class _Merged:
    recipe: Mapping[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    lists: dict[Key, _List] = field(default_factory=dict)
    owners: dict[Key, str] = field(default_factory=dict)

    def add(self, owner: str, config: Mapping[str, Any], at: Key) -> None:
        for name, value in config.items():
            key = (*at, str(name).removesuffix("+"))
            extends = str(name).endswith("+")
            if extends or key in _LISTS or _holds_objects(value):
                given = self.lists.setdefault(key, _List())
                into = given.added if extends else given.instead
                into += [(owner, entry) for entry in _as_list(value)]
                given.replaced = given.replaced or not extends
                _place(self.config, key, None)  # its place among the keys
            elif isinstance(value, dict) and key not in _SINGLE and not self._is_another_class(key, value):
                if _at(self.config, key) is None:
                    _place(self.config, key, {})
                self.add(owner, value, key)
            else:
                self._set(owner, key, value)

    def set_list(self, key: Key, given: _List) -> None:
        of_recipe = _at(self.recipe, key)
        if not given.replaced:
            given.instead = [("the recipe's `config.yaml`", entry) for entry in _as_list(of_recipe)]
        joined: list[tuple[str, Any]] = []
        for owner, entry in (*given.instead, *given.added):
            if any(_is_same(entry, other) for _, other in joined):
                continue
            for other_owner, other in joined:
                if _class(entry) == _class(other) and _is_single(key, entry) and owner != other_owner:
                    raise CommandError(
                        f"{other_owner} and {owner} both set `{_class(entry)}` in `{'.'.join(key)}`, each in "
                        "its own way, but a run has one. Leave one of them out, or write a variant with what "
                        "you mean."
                    )
            joined.append((owner, entry))
        parent, name = _at(self.config, key[:-1]), key[-1]
        if not given.replaced and of_recipe is None:
            # The default of the argument may be a list.
            del parent[name]
            name += "+"
        parent[name] = [entry for _, entry in joined]

    def _set(self, owner: str, key: Key, value: Any) -> None:
        earlier = _at(self.config, key)
        before = self._owner(key)
        if before is not None and earlier != value:
            dotted = ".".join(key)
            if key in _SINGLE:
                raise CommandError(
                    f"{before} and {owner} both set `{dotted}`, to {_short(earlier)} and {_short(value)}, "
                    "but a run has one. Leave one of them out."
                )
            self.remarks.append(f"`{dotted}` is {_short(value)} by {owner}; {before} has {_short(earlier)}.")
        for inner in [inner for inner in (*self.owners, *self.lists) if inner[: len(key)] == key]:
            self.owners.pop(inner, None)
            self.lists.pop(inner, None)
        self.owners[key] = owner
        _place(self.config, key, value)

    def _owner(self, key: Key) -> str | None:
        """Who set the value, or the last part of it."""
        owners = [owner for set_key, owner in self.owners.items() if set_key[: len(key)] == key]
        return owners[-1] if owners else None

    def _is_another_class(self, key: Key, value: Mapping[str, Any]) -> bool:
        """Whether arguments of an earlier class would be taken for those of this one."""
        earlier = _at(self.config, key)
        if not isinstance(earlier, dict):
            return earlier is not None
        return (
            "class_path" in earlier
            and value.get("class_path", earlier["class_path"]) != earlier["class_path"]
        )


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) and "class_path" in one for one in value)


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _class(entry: Any) -> str:
    path = entry.get("class_path", "") if isinstance(entry, dict) else entry
    return str(path).rpartition(".")[2]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two entries make equal objects; a class may be named without its module, and alone."""
    arguments, others = ((e if isinstance(e, dict) else {}).get("init_args") or {} for e in (one, other))
    paths = [str(e.get("class_path") if isinstance(e, dict) else e) for e in (one, other)]
    return arguments == others and _class(one) == _class(other) and len({p for p in paths if "." in p}) < 2


def _is_single(key: Key, entry: Any) -> bool:
    """Whether a run has one object of this class: a plugin, and a technique, which refuses a second one."""
    return key == ("trainer", "plugins") or _class(entry) in lightning_memtrain.__all__


def _at(config: Any, key: Key) -> Any:
    for name in key:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _place(config: dict[str, Any], key: Key, value: Any) -> None:
    for name in key[:-1]:
        if not isinstance(config.get(name), dict):
            config[name] = {}
        config = config[name]
    config[key[-1]] = value


def _short(value: Any) -> str:
    text = str(value["class_path"]) if isinstance(value, dict) and "class_path" in value else f"{value}"
    return "null" if value is None else f"`{text}`" if isinstance(value, (dict, str)) else text
