"""docs/api.md has a section with an example for every public name, and shows its documentation."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_memtrain

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
NAMES = [name for name in lightning_memtrain.__all__ if not name.startswith("__")]


def sections(page: str) -> dict[str, str]:
    """Text of each second-level section, by its heading."""
    _, *parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_public_name_has_its_section_and_no_section_is_left_over() -> None:
    assert sorted(sections(PAGE)) == sorted(NAMES)


def test_every_section_shows_the_documentation_and_uses_the_name_in_an_example() -> None:
    for name, text in sections(PAGE).items():
        assert f":: lightning_memtrain.{name}\n" in text, f"no autodoc directive for {name}"
        examples = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        assert examples, f"no example for {name}"


def test_the_record_types_are_named_where_they_are_read() -> None:
    shown = " ".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
    reached = {"ModuleMemory": "breakdown.modules", "TimelineEvent": "breakdown.timeline"}
    reached["MemoryBreakdown"] = "ledger.breakdown()"
    for name in NAMES:
        assert reached.get(name, f"mt.{name}") in shown, f"no example uses {name}"
