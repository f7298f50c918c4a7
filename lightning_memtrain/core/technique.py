"""What every technique says about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, runtime_checkable

from lightning_memtrain.core.arguments.argument_error import ArgumentError

#: What a setting's value may be, so that a report can be written as JSON.
Setting = str | int | float | bool | None


@dataclass(frozen=True)
class TechniqueRecord:
    """What a technique did in a run.

    Args:
        name: of the technique, e.g. ``"Microbatching"``.
        settings: values in force, by name; text, numbers that are finite, booleans and ``None``.
        events: what it chose or changed during the run, in order, each a sentence such as
            ``"step 12: out of memory at microbatch_size=32, redone with 16"``.

    Raises:
        ArgumentError: if ``name`` or an event is no text, ``name`` is empty, or a setting's value is of
            another type, infinite or not a number.

    Example:
        >>> print(TechniqueRecord("Microbatching", {"microbatch_size": 16, "recover": True}))
        Microbatching(microbatch_size=16, recover=True)
    """

    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    events: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentError(
                f"`TechniqueRecord(name)` must be text, but got name={self.name!r}. {_NAME_CURE}"
            )
        if not self.name:
            raise ArgumentError(f"`TechniqueRecord(name)` must not be empty, but got name=''. {_NAME_CURE}")
        if not isinstance(self.settings, Mapping):
            raise ArgumentError(
                "`TechniqueRecord(settings)` must map names to values, but got "
                f"settings={self.settings!r}. Write e.g. settings={{'num_parts': 2}}."
            )
        for key, value in self.settings.items():
            got = f"but got settings[{key!r}]={value!r}"
            if not isinstance(key, str) or not isinstance(value, (str, int, float, bool, type(None))):
                raise ArgumentError(
                    "`TechniqueRecord(settings)` must map names to text, numbers, booleans or None, "
                    f"{got}. Write it as text, e.g. `str(value)`."
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ArgumentError(
                    f"`TechniqueRecord(settings)` must hold finite numbers, which JSON can write, {got}. "
                    "Write it as text, or as None if it means that there is none."
                )
        if isinstance(self.events, list):
            object.__setattr__(self, "events", tuple(self.events))
        if not isinstance(self.events, tuple) or not all(isinstance(event, str) for event in self.events):
            raise ArgumentError(
                f"`TechniqueRecord(events)` must be a tuple of sentences, but got events={self.events!r}. "
                "Give one text per event, e.g. `events=(event,)`."
            )
        # The technique goes on with its own, which must not change this record.
        object.__setattr__(self, "settings", dict(self.settings))
        object.__setattr__(self, "events", tuple(self.events))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON."""
        return {"name": self.name, "settings": dict(self.settings), "events": list(self.events)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TechniqueRecord:
        """The inverse of :meth:`to_dict`."""
        return cls(name=data["name"], settings=dict(data["settings"]), events=tuple(data["events"]))


_NAME_CURE = "Use the name of the technique's class."


@runtime_checkable
class Technique(Protocol):
    """A callback, strategy or precision plugin that makes a training step need less memory."""

    @property
    def exact(self) -> bool:
        """Whether the result is the same in exact arithmetic, given this model.

        Microbatching, for instance, is exact for a model without batch norm only.
        """

    def technique_record(self) -> TechniqueRecord:
        """What is in force and what happened so far.

        Asked when a run is over, also by an error, and possibly after the technique's own ``teardown``; so
        the answer has to stay until the next run's ``setup``.
        """


def readable_repr(technique: Technique) -> str:
    """A technique with its settings, for its ``__repr__``.

    Args:
        technique: which may not have begun yet.

    Returns:
        E.g. ``"Microbatching(num_microbatches=4)"``.
    """
    try:
        return str(technique.technique_record())
    except Exception:  # in the middle of something; a repr is asked for by debuggers then
        return f"{type(technique).__name__}(...)"


def is_technique(candidate: object) -> TypeGuard[Technique]:
    """Whether an object is a :class:`Technique` by its own class.

    Args:
        candidate: any object, such as one of the trainer's callbacks.

    Returns:
        ``False`` also for objects that have every attribute that they are asked for (mocks, proxies).

    Example:
        >>> from unittest.mock import MagicMock
        >>> is_technique(MagicMock())
        False
    """
    own = getattr(type(candidate), "technique_record", None)
    return callable(own) and isinstance(candidate, Technique)
