"""Plans as plain names and values, and as YAML that a person can read and change."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lightning_memtrain.core import ArgumentError, format_bytes
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.planning.fit.expressions import plain_values
from lightning_memtrain.planning.fit.holding.fingerprint import Fingerprint
from lightning_memtrain.planning.fit.way import Floor, FoundWays, Place, Refused, TechniqueSettings, Way
from lightning_memtrain.tracing.device import Device

#: Version of what a plan's file holds.
SCHEMA_VERSION = 1

_KIND = "lightning_memtrain plan"
_PLACES: tuple[Place, ...] = ("callbacks", "plugins")

# What is known of a way beside what it is made of.
_PREDICTED = ("allocated_bytes", "reserved_bytes", "time_ratio", "exact")

EDITED = "edited by hand: what it needs and changes is not known"


def trainer_section(way: Way) -> dict[str, Any]:
    """A way as the ``trainer`` section of a LightningCLI's configuration.

    Args:
        way: any.

    Returns:
        Plain names and values.

    Example:
        >>> trainer_section(Way((), 9, 9, 1.0, True, trainer_arguments={"precision": "bf16-mixed"}))
        {'precision': 'bf16-mixed'}
    """
    section: dict[str, Any] = dict(way.trainer_arguments)
    for place in _PLACES:
        objects = [_entry(one) for one in way.techniques if one.place == place]
        if objects:
            section[place] = objects
    return section


def way_to_dict(way: Way) -> dict[str, Any]:
    """A way as plain names and values.

    Args:
        way: any.

    Returns:
        What it is made of under ``trainer``, and what is known of it.
    """
    data: dict[str, Any] = {"trainer": trainer_section(way)}
    if way.by_hand:
        data["by_hand"] = list(way.by_hand)
    data |= {name: getattr(way, name) for name in _PREDICTED}
    if way.changes:
        data["changes"] = list(way.changes)
    return data


def way_from_dict(data: Mapping[str, Any]) -> Way:
    """The inverse of :func:`way_to_dict`.

    Args:
        data: what that returned, or a person wrote in its form.

    Returns:
        The way.
    """
    section = dict(data.get("trainer") or {})
    techniques = tuple(
        TechniqueSettings(*_class_and_arguments(entry), place)
        for place in _PLACES
        for entry in section.pop(place, None) or ()
    )
    return Way(
        techniques=techniques,
        allocated_bytes=data["allocated_bytes"],
        reserved_bytes=data["reserved_bytes"],
        time_ratio=data["time_ratio"],
        exact=data["exact"],
        changes=tuple(data.get("changes") or ()),
        trainer_arguments=section,
        by_hand=tuple(data.get("by_hand") or ()),
    )


def found_to_dict(found: FoundWays) -> dict[str, Any]:
    """What a search came to, as plain names and values.

    Args:
        found: any.

    Returns:
        What it holds, but for the chosen way, which has a place of its own.
    """
    return {
        "plain": way_to_dict(found.plain),
        "front": [way_to_dict(way) for way in found.front],
        "offered": [way_to_dict(way) for way in found.offered],
        "floor": {
            "way": way_to_dict(found.floor.way),
            "held": dict(found.floor.held),
            "unlocks": dict(found.floor.unlocks),
        },
        "refused": [{"what": one.what, "why": one.why, "allow": one.allow} for one in found.refused],
        "notes": list(found.notes),
        "batch_shapes": [list(shape) for shape in found.batch_shapes],
        "stateful": list(found.stateful),
        "held_bytes": found.held_bytes,
        "seconds": found.seconds,
    }


def plan_to_dict(
    found: FoundWays, device: Device, limit_bytes: int, allow: tuple[str, ...], fingerprint: Fingerprint
) -> dict[str, Any]:
    """A plan as plain names and values.

    Args:
        found: what the search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.
        allow: what may change the result.
        fingerprint: the run that it holds for.

    Returns:
        What is read first and changed by hand at the beginning: ``trainer``, the chosen way.
    """
    chosen = found.chosen
    known = {} if chosen is None else way_to_dict(chosen)
    return {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "model": fingerprint.model,
        "fits": chosen is not None,
        "limit_bytes": limit_bytes,
        "device": plain_values(asdict(device)),
        "allow": list(allow),
        "trainer": known.pop("trainer", None),
        # What it was predicted for, so that a change by hand is seen.
        "predicted": None if chosen is None else {"of": _digest(trainer_section(chosen)), **known},
        **found_to_dict(found),
        "made_for": {
            "batch_size": fingerprint.batch_size,
            "versions": dict(fingerprint.versions),
            "parameters": dict(fingerprint.parameters),
        },
    }


def plan_from_dict(
    data: Mapping[str, Any],
) -> tuple[FoundWays, Device, int, tuple[str, ...], Fingerprint]:
    """The inverse of :func:`plan_to_dict`.

    Args:
        data: what that returned, possibly changed by hand.

    Returns:
        Its arguments.

    Raises:
        ArgumentError: if it is no plan, of another schema, or lacks an entry.
    """
    if not isinstance(data, Mapping) or data.get("kind") != _KIND:
        raise ArgumentError(
            f"must be a plan (a mapping with kind: {_KIND}), but is none. Pass what `Plan.save` or "
            "`memtrain plan` wrote."
        )
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArgumentError(
            f"must be a plan with schema_version: {SCHEMA_VERSION}, but has {version!r}. Plan again with "
            "this version."
        )
    try:
        batch_size = data["made_for"]["batch_size"]
        floor = data["floor"]
        found = FoundWays(
            plain=way_from_dict(data["plain"]),
            chosen=_chosen(data),
            front=tuple(map(way_from_dict, data["front"])),
            floor=Floor(
                way_from_dict(floor["way"]), tuple(floor["held"].items()), tuple(floor["unlocks"].items())
            ),
            offered=tuple(map(way_from_dict, data["offered"])),
            refused=tuple(Refused(**one) for one in data["refused"]),
            notes=tuple(data["notes"]),
            batch_size=batch_size,
            batch_shapes=tuple(tuple(shape) for shape in data["batch_shapes"]),
            stateful=tuple(data.get("stateful") or ()),
            held_bytes=data["held_bytes"],
            seconds=data["seconds"],
        )
        capability = data["device"]["compute_capability"]
        device = Device(
            **{**data["device"], "compute_capability": None if capability is None else tuple(capability)}
        )
        fingerprint = Fingerprint(
            data["model"], data["made_for"]["parameters"], batch_size, data["made_for"]["versions"]
        )
        return found, device, int(data["limit_bytes"]), tuple(data["allow"]), fingerprint
    except (KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"must be a whole plan, but an entry is missing or wrong: {type(error).__name__}: {error}. Only "
            "`trainer` and `limit_bytes` are meant to be changed; plan again for the rest."
        ) from error


def write_plan(data: Mapping[str, Any], path: Path) -> None:
    """Write a plan as YAML.

    Args:
        data: of :func:`plan_to_dict`.
        path: the file to write or to replace.
    """
    head = (
        f"# How {data['model'].rpartition('.')[2]} keeps {format_bytes(data['limit_bytes'])} on "
        f"{data['device']['name']}. `trainer` is the way that is taken: change it as you like,\n"
        "# and what is predicted of it is left out. `front` has other ways, each with a `trainer` to copy.\n"
    )
    write_atomically(path, head + yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, width=100))


def read_plan(path: Path) -> Any:
    """Read YAML that :func:`write_plan` wrote.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: if there is no such file.
        ArgumentError: if it is no YAML.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a plan at {str(path)!r}, but there is no such file. `Plan.save` and `memtrain plan` "
            "write one."
        )
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"must be YAML, but is not: {error}. Correct it, or plan again.") from error


# ------------------------------------------------------------------ parts


def _chosen(data: Mapping[str, Any]) -> Way | None:
    if data["trainer"] is None and not data["fits"]:
        return None
    known = data.get("predicted") or {}
    unknown = dict.fromkeys(_PREDICTED)
    way = way_from_dict({**unknown, **known, "trainer": data["trainer"]})
    if _digest(trainer_section(way)) == known.get("of"):
        return way
    return way_from_dict({**unknown, "trainer": data["trainer"], "exact": False, "changes": [EDITED]})


def _digest(section: Mapping[str, Any]) -> str:
    """What tells a `trainer` section from one that was changed by hand."""
    return hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()[:12]


def _entry(settings: TechniqueSettings) -> dict[str, Any]:
    arguments = plain_values(settings.init_args)
    return {"class_path": settings.class_path, **({"init_args": arguments} if arguments else {})}


def _class_and_arguments(entry: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    return entry["class_path"], dict(entry.get("init_args") or {})


class _Dumper(yaml.SafeDumper):
    """Writes short lists, such as shapes, in one line, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> Any:
        flat = all(isinstance(one, (int, float, str)) for one in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Dumper.add_representer(list, _Dumper.represent_list)


class _Loader(yaml.SafeLoader):
    """Takes ``1e-3`` for a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?\d*\.\d+|[-+]?\d+\.)$"),
    list("-+0123456789."),
)
