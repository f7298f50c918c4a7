from __future__ import annotations

import dataclasses
import json
from unittest.mock import MagicMock

import pytest

from lightning_memtrain.core import Technique, TechniqueRecord, is_technique

SETTINGS = {"microbatch_size": 16, "budget": None, "recover": True, "scale": 0.5, "mode": "auto"}
EVENT = "step 12: out of memory at microbatch_size=32, redone with 16"


class Halving:
    """Satisfies the protocol without naming it."""

    exact = True

    def technique_record(self) -> TechniqueRecord:
        return TechniqueRecord("Halving", {"size": 2})


class WithoutExact:
    def technique_record(self) -> TechniqueRecord:
        return TechniqueRecord("WithoutExact")


class Proxy:
    """Claims to have everything."""

    def __getattr__(self, name: str) -> object:
        return lambda: None


def test_a_record_survives_json():
    record = TechniqueRecord("Microbatching", SETTINGS, (EVENT,))
    assert json.loads(json.dumps(record.to_dict(), allow_nan=False)) == {
        "name": "Microbatching",
        "settings": SETTINGS,
        "events": [EVENT],
    }
    assert TechniqueRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_a_record_reads_like_a_constructor():
    assert str(TechniqueRecord("Microbatching", SETTINGS)) == (
        "Microbatching(microbatch_size=16, budget=None, recover=True, scale=0.5, mode='auto')"
    )
    assert str(TechniqueRecord("RigL")) == "RigL()"


def test_a_record_does_not_change_with_its_technique():
    settings, events = {"size": 2}, ["a"]
    record = TechniqueRecord("Halving", settings, events)
    settings["size"], events[0] = 1, "b"
    assert record == TechniqueRecord("Halving", {"size": 2}, ("a",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.name = "Other"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, r"`TechniqueRecord\(name\)` must be text, but got name=3\. Use the name of"),
        (
            ("",),
            ValueError,
            r"`TechniqueRecord\(name\)` must not be empty, but got name=''\. Use the name of",
        ),
        (
            ("T", {"sizes": [1, 2]}),
            TypeError,
            r"`TechniqueRecord\(settings\)` must map names to text, numbers, booleans or None, "
            r"but got settings\['sizes'\]=\[1, 2\]\. Write it as text",
        ),
        (("T", {1: 2}), TypeError, r"but got settings\[1\]=2\. Write it as text"),
        (
            ("T", {"budget": float("inf")}),
            ValueError,
            r"must hold finite numbers, which JSON can write, but got settings\['budget'\]=inf\. Write it as",
        ),
        (("T", {"budget": float("nan")}), ValueError, r"but got settings\['budget'\]=nan"),
        (
            ("T", {}, "one event"),
            TypeError,
            r"`TechniqueRecord\(events\)` must be a tuple of sentences, but got events='one event'\. Give",
        ),
        (("T", {}, (1,)), TypeError, r"but got events=\(1,\)\. Give one text per event"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_the_cure(arguments, error, message):
    with pytest.raises(error, match=message):
        TechniqueRecord(*arguments)


def test_a_technique_is_known_by_its_class():
    assert is_technique(Halving())
    assert isinstance(Halving(), Technique)
    for other in (WithoutExact(), Proxy(), MagicMock(), MagicMock(spec=Halving), Halving, None, object()):
        assert not is_technique(other)
