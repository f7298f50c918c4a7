"""docs/api.md shows the documentation of every public name, and an example that is run uses it."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import lightning_memtrain

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "api.md").read_text()
TECHNIQUES = (
    *("checkpointing", "checkpointing.experimental", "microbatching", "optimizer_in_backward"),
    *("planning", "precision", "sparsity"),
)
TOP = [name for name in lightning_memtrain.__all__ if not name.startswith("__")]
NAMES = TOP + [
    f"{subpackage}.{name}"
    for subpackage in TECHNIQUES
    for name in importlib.import_module(f"lightning_memtrain.{subpackage}").__all__
    if name not in TOP
]


def sections(page: str) -> dict[str, str]:
    """Text of each third-level section, by its heading."""
    _, *parts = re.split(r"^### (.+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def examples(page: str) -> str:
    return "".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))


EXAMPLES = "".join(examples(page.read_text()) for page in sorted(DOCS.glob("*.md")))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_shown_and_used_in_an_example_that_is_run(name: str) -> None:
    assert f":: lightning_memtrain.{name}\n" in PAGE, f"no autodoc directive for {name}"
    value = lightning_memtrain
    for part in name.split("."):
        value = getattr(value, part)
    short = name.rpartition(".")[2]
    in_docstring = ">>> " in (inspect.getdoc(value) or "")
    assert in_docstring or re.search(rf"(?<!\w){short}(?!\w)", EXAMPLES), f"no example uses {name}"


def test_every_section_has_an_example_or_names_the_one_that_shows_it() -> None:
    for name, text in sections(PAGE).items():
        assert examples(text) or "which see" in text, f"no example for {name}"


def test_what_the_page_shows_exists() -> None:
    for path in re.findall(r"^\.\. auto\w+:: lightning_memtrain\.(\S+)$", PAGE, flags=re.MULTILINE):
        value = lightning_memtrain
        for part in path.split("."):
            value = getattr(value, part)
        assert inspect.getdoc(value), path


def test_there_are_few_names_at_the_top() -> None:
    assert len(TOP) <= 17
    assert [*lightning_memtrain._HOMES, "__version__"] == [
        *(name for name in lightning_memtrain.__all__ if name != "__version__"),
        "__version__",
    ]


def test_a_name_of_a_subpackage_is_pointed_to() -> None:
    with pytest.raises(
        AttributeError, match=r"has no attribute 'RigL'; it is `lightning_memtrain\.sparsity\.RigL`$"
    ):
        getattr(lightning_memtrain, "RigL")  # noqa: B009
