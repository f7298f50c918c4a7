"""Everything public refuses bad arguments by one error, which names the argument and what to do."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import lightning_memtrain as mt
from tests.helpers.bad_values import CASES, MADE_BY_THE_LIBRARY, WITHOUT_ARGUMENTS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text()
# One name of each thing: `microbatching.microbatched_backward` is shown at the top, too.
NAMES = set(re.findall(r"^\.\. auto\w+:: lightning_memtrain\.(\S+)$", PAGE, flags=re.MULTILINE)) - {
    "microbatching.microbatched_backward"
}


def named(name: str) -> Any:
    value: Any = mt
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_all_that_is_public_is_here():
    assert CASES.keys() | MADE_BY_THE_LIBRARY | WITHOUT_ARGUMENTS == NAMES
    for name, case in CASES.items():
        assert set(inspect.signature(named(name)).parameters) == {*case.bad, *case.free}, name


def wrong_about(message: str, argument: str) -> list[str]:
    """What the message about an argument lacks."""
    lacks = []
    if not re.search(rf"`[^`]*\b{argument}\b[^`]*`", message):
        lacks.append("the argument in code quotes")
    if not re.search(r"\b(must|needs|takes|cannot|names)\b", message):
        lacks.append("what was expected")
    if not re.search(r"\bbut (got|there|it|has|the)\b|, which\b|: ", message):
        lacks.append("what came")
    if not re.search(r"[.?] [A-Z`][^.]* .*[.?]$", message, flags=re.DOTALL):
        lacks.append("a sentence that says what to do")
    return lacks


@pytest.mark.parametrize("name", sorted(CASES))
def test_bad_arguments_are_refused_by_one_error_that_helps(name: str):
    case, failures = CASES[name], []
    for argument, values in case.bad.items():
        for value in values:
            given = case.good() | {argument: value}
            if argument == "microbatch_size":
                given.pop("num_microbatches", None)
            if name == "Microbatching" and argument == "limit":
                given = {"microbatch_size": "auto", "limit": value}
            call = f"{name}({argument}={value!r})"
            try:
                named(name)(**given)
            except mt.ArgumentError as error:
                failures += [f"{call}: lacks {lack}: {error}" for lack in wrong_about(str(error), argument)]
            except Exception as error:
                failures.append(f"{call}: {type(error).__name__}: {error}")
            else:
                failures.append(f"{call}: accepted")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_mistyped_keyword_is_a_plain_type_error(name: str):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'") as caught:
        named(name)(**CASES[name].good(), nonsense=3)
    assert not isinstance(caught.value, mt.ArgumentError)
