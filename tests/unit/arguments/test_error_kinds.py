"""Messages about arguments are raised as `ArgumentError` throughout the code, also where no test gets to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODULES = [*(ROOT / "lightning_memtrain").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
OTHERS = {"ValueError", "TypeError", "MisconfigurationException"}

# "`Every(k)` must be ...": what an argument must be. What a run must be is said without an argument.
ABOUT_AN_ARGUMENT = re.compile(r"`[\w.{}]+\(\w+(, \w+)*\)` must\b")
# Nobody passes these: they are of the simulated allocator, and of a door that is used within the library.
INTERNAL = {"caching_allocator.py", "lightning_packages.py"}


def messages(source: str) -> Iterator[tuple[str, str, int]]:
    """Name, beginning and line of each error that is made."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            written = (part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
            yield node.func.id, "".join(map(str, written)), node.lineno


def test_what_an_argument_must_be_is_said_by_one_error():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {text}"
        for path in MODULES
        if path.name not in INTERNAL
        for name, text, line in messages(path.read_text())
        if name in OTHERS and ABOUT_AN_ARGUMENT.match(text)
    ]
    assert len(MODULES) > 300
    assert not found, "\n".join(found)


def test_the_check_sees_what_it_is_for():
    source = 'raise ValueError(f"`{owner}(limit)` must be above 0, but got {limit}. Raise it.")'
    ((name, text, line),) = messages(source)
    assert (name, line) == ("ValueError", 1)
    assert ABOUT_AN_ARGUMENT.match(text)
    assert not ABOUT_AN_ARGUMENT.match("`Microbatching` must be given once, but got 2. Leave one.")
