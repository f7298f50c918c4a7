"""What a run says of itself in its folder: ``run.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
NAME = "run.json"

_KIND = "lightning_memtrain run"


@dataclass(frozen=True)
class RunRecord:
    """How far a run has come, and what it took and reached.

    Args:
        recipe: name of the recipe.
        state: ``"running"`` (also of a run that was killed), ``"interrupted"``, ``"failed"``, ``"trained"``
            (but not tested yet) or ``"finished"``.
        reason: why it failed; else ``""``.
        seed: what random numbers began with; ``None`` if they were not seeded.
        started: when its first part began, ISO 8601 in UTC.
        seconds: time in training, all parts together, up to the checkpoints that they went on from.
        num_parts: 1, and one more for each time that it was resumed.
        num_steps: optimizer steps done.
        total_steps: optimizer steps that the run is meant to have; ``None`` if it has no end.
        step_seconds: median time of a step that nobody measured the memory of; ``None`` if there was none.
        num_timed_steps: how many steps that is the median of.
        ledger_peak_bytes: of the highest training step that the ledger watched; ``None`` without profiler.
        allocator_peak_bytes: of the same step by the device's allocator; ``None`` if it is not known.
        at_peak: bytes of that step by category, which add up to the allocator's peak where it is known.
        metrics: last value of all that was logged, by name.
        techniques: what made steps need less memory, as in the memory report.
        environment: versions and hardware, by name.
        study: of a run of a study, which one and as what; else empty.
    """

    recipe: str
    state: str
    started: str
    reason: str = ""
    seed: int | None = None
    seconds: float = 0.0
    num_parts: int = 1
    num_steps: int = 0
    total_steps: int | None = None
    step_seconds: float | None = None
    num_timed_steps: int = 0
    ledger_peak_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    at_peak: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    techniques: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    study: Mapping[str, Any] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int | None:
        """The peak by the allocator where it is known, else by the ledger."""
        return self.ledger_peak_bytes if self.allocator_peak_bytes is None else self.allocator_peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON."""
        return {"kind": _KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """The inverse of :meth:`to_dict`.

        Args:
            data: possibly after a trip through JSON.

        Returns:
            The record.

        Raises:
            ValueError: if it is none, or of another version.
        """
        if data.get("kind") != _KIND or data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"Expected the record of a run (kind={_KIND!r}, schema_version={SCHEMA_VERSION}), but got "
                f"kind={data.get('kind')!r}, schema_version={data.get('schema_version')!r}. "
                "Read it with the version of lightning_memtrain that wrote it."
            )
        rest = {key: value for key, value in data.items() if key not in ("kind", "schema_version")}
        try:
            return cls(**{**rest, "techniques": tuple(rest.get("techniques", ()))})
        except TypeError as error:
            raise ValueError(
                f"Expected the record of a run, but an entry is missing or wrong: {error}."
            ) from error

    @classmethod
    def load(cls, folder: Path | str) -> RunRecord | None:
        """Read the record in a run's folder.

        Args:
            folder: of the run.

        Returns:
            The record; ``None`` if there is none, as of a run that was killed before it began to train.

        Raises:
            ValueError: if the file is no record, or of another version.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, Mapping):
                raise ValueError(f"Expected an object, but got {type(data).__name__}.")
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"`{path}` cannot be read: {error}") from error
