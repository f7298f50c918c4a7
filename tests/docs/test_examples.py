"""Every code block of the documentation and every docstring example is executed."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

from lightning_memtrain.cli import main
from tests.helpers.forked import run_forked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]
MODULES = sorted(
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "lightning_memtrain").rglob("*.py")
        if path.name != "__main__.py" and "recipes" not in path.relative_to(ROOT).parts
    ]
    + [
        ".".join(("lightning_memtrain", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for path in (ROOT / "recipes").rglob("*.py")
    ]
)
EXECUTED = ("python", "bash", "console", "yaml")
# Examples may print Lightning's hints on data loading and logging; users see them too.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@contextlib.contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Examples write reports and runs: never into the checkout, and never to a server."""
    filters, random_state = warnings.filters[:], torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield
        wandb.finish()
    warnings.filters[:] = filters
    torch.set_rng_state(random_state)


def evaluate_yaml(example: Example) -> None:
    assert yaml.safe_load(example.parsed) is not None


def evaluate_console(example: Example) -> None:
    run_lines([line.removeprefix("$ ") for line in lines_of(example) if line.startswith("$ ")])


def evaluate_bash(example: Example) -> None:
    run_lines(lines_of(example))


def lines_of(example: Example) -> list[str]:
    return str(example.parsed).replace("\\\n", " ").splitlines()


def run_lines(lines: list[str]) -> None:
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert commands, "an empty block"
    for program, *arguments in commands:
        assert program in COMMANDS, f"no check for the command {program!r}: add one to COMMANDS"
        COMMANDS[program](arguments)
    run_memtrain([arguments for program, *arguments in commands if program == "memtrain"])


def run_memtrain(commands: list[list[str]]) -> None:
    """Run a block's commands in a process of their own, where LightningCLI meets no test's classes."""
    if commands:
        shorter = [shortened(command) for command in commands]
        done = run_forked(one_after_the_other, shorter, cwd=Path.cwd(), environment={**os.environ})
        assert done.returncode == 0, done.stdout + done.stderr


def one_after_the_other(commands: list[list[str]]) -> str | None:
    """Runs `memtrain` commands; says which one failed."""
    for command in commands:
        try:
            code = main(command)
        except SystemExit as ended:
            code = ended.code
        if code:
            return f"memtrain {command}: exit code {code}"
    return None


def shortened(arguments: list[str]) -> list[str]:
    """The same command; but a long training only has its configuration resolved."""
    if arguments[0] == "demo":
        return [*arguments, "--help"]
    if arguments[0] == "run" and "smoke" not in arguments:
        return [*arguments, "--print_config"]
    if arguments[0] == "study":
        return [*arguments, "--wandb-sweep"]  # the whole plan is made, and nothing run
    return arguments


def check_make(arguments: list[str]) -> None:
    """Running the target would run this test again; that it exists is what an example can get wrong."""
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert targets
    for argument in arguments:
        assert "=" in argument or argument in targets[1].split(), f"the Makefile has no target {argument!r}"


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    command, *requirements = arguments
    assert command == "install"
    for requirement in requirements:
        named = re.fullmatch(r"(?:\.|lightning-memtrain)(?:\[([\w,]+)\])?", requirement)
        assert named, f"no check for the requirement {requirement!r}"
        assert set((named[1] or "all").split(",")) <= set(extras), f"no such extra in {requirement!r}"


def check_export(arguments: list[str]) -> None:
    """The value is the reader's own; only the form can be wrong."""
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*=.+", argument) for argument in arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "export": check_export,
    "make": check_make,
    "pip": check_pip,
    "memtrain": lambda arguments: None,  # run_memtrain runs all of a block
}


def examples_of(page: Path) -> list[Example]:
    parsers = [
        PythonCodeBlockParser(),
        CodeBlockParser("bash", evaluate_bash),
        CodeBlockParser("console", evaluate_console),
        CodeBlockParser("yaml", evaluate_yaml),
    ]
    document = Sybil(parsers).parse(page)
    if page.name == "README.md" and page.parent == ROOT:
        document.namespace |= {"model": BoringModel(), "datamodule": BoringDataModule()}
    return list(document.examples())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page(page: Path, tmp_path: Path) -> None:
    with elsewhere(tmp_path):
        for example in examples_of(page):
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_has_a_language_that_is_executed(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
    opening = fences[::2]
    executed = [language for language in opening if language in EXECUTED]
    others = {*opening} - {*EXECUTED, "text", "{eval-rst}", "{toctree}", "{include}"}
    assert not others, f"use one of {EXECUTED}, or text for what is no code"
    assert len(examples_of(page)) == len(executed)


def test_an_example_that_is_wrong_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nassert 1 == 2\n```\n")
    (example,) = examples_of(page)
    with pytest.raises(AssertionError):
        example.evaluate()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path) -> None:
    output = io.StringIO()
    with elsewhere(tmp_path), contextlib.redirect_stdout(output):
        failed, _ = doctest.testmod(import_module(name))
    assert not failed, output.getvalue()


def test_docstring_examples_are_found() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)

    def examples() -> Iterator[doctest.DocTest]:
        for name in MODULES:
            yield from (test for test in finder.find(import_module(name)) if test.examples)

    assert {test.name for test in examples()} >= {
        "lightning_memtrain.core.categories.CategoryBytes",
        "lightning_memtrain.core.units.format_bytes",
        "lightning_memtrain.ledger.memory_ledger.MemoryLedger",
    }
