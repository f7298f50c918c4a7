"""What pyproject.toml declares, and that the pinned versions agree with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import lightning_memtrain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def pins(file_name: str) -> dict[str, list[Requirement]]:
    """Requirements of a constraints file by name; a name has several when its pin depends on the Python."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / file_name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def declared() -> dict[str, Requirement]:
    """Every requirement of ours on another package, whichever extra it stands in."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in requirements if r.name != "lightning-memtrain"}


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is no pin"
    return specifier.version


@pytest.mark.parametrize(
    ("name", "specifier"),
    [
        ("lightning", ">=2.4,!=2.6.2,!=2.6.3,<2.8"),
        ("torch", ">=2.5"),
        ("torchmetrics", ">=1.0"),
        ("wandb", ">=0.19.11"),
        ("jsonargparse", ">=4.39,<5"),
    ],
)
def test_declared_ranges(name: str, specifier: str) -> None:
    assert declared()[name].specifier == SpecifierSet(specifier)


def test_the_malicious_lightning_releases_are_excluded() -> None:
    versions = ["2.4.0", "2.6.1", "2.6.2", "2.6.3", "2.6.6", "2.7.0", "2.8.0"]
    assert list(declared()["lightning"].specifier.filter(versions)) == ["2.4.0", "2.6.1", "2.6.6", "2.7.0"]


def test_extras() -> None:
    expected = {"wandb", "cli", "bnb", "ao", "recipes", "translation", "docs", "dev", "all"}
    assert set(EXTRAS) == expected
    (everything,) = (Requirement(line) for line in EXTRAS["all"])
    assert everything.extras == set(EXTRAS) - {"all"}


def test_every_declared_package_is_pinned_within_its_range() -> None:
    pinned = pins("constraints.txt")
    for name, requirement in declared().items():
        assert name in pinned, f"{name} is declared but not in constraints.txt: run `make constraints`"
        for pin in pinned[name]:
            assert pinned_version(pin) in requirement.specifier, f"{pin} lies outside of {requirement}"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_declared_package_is_pinned_once_for_each_supported_python(python: str) -> None:
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert python in SpecifierSet(PROJECT["requires-python"])
    machine = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    pinned = pins("constraints.txt")
    for name in declared():
        matching = [pin for pin in pinned[name] if pin.marker is None or pin.marker.evaluate(machine)]
        assert len(matching) == 1, f"{name} has {len(matching)} pins on Python {python}"


def test_pinned_torch_and_lightning() -> None:
    pinned = pins("constraints.txt")
    assert [str(pinned[name][0]) for name in ("torch", "lightning")] == ["torch==2.13.0", "lightning==2.6.6"]


def test_constraints_leave_the_build_of_torch_open() -> None:
    assert not [name for name in pins("constraints.txt") if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_constraints_name_no_index_and_no_path() -> None:
    for file_name in ("constraints.txt", "constraints-oldest.txt"):
        assert not re.search(r"^\s*-|://|file:| @ ", (ROOT / file_name).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["lightning", "torchmetrics"])
def test_the_oldest_versions_tested_are_the_lowest_declared(name: str) -> None:
    (lowest,) = (spec.version for spec in declared()[name].specifier if spec.operator == ">=")
    (pin,) = pins("constraints-oldest.txt")[name]
    assert pinned_version(pin) == f"{lowest}.0"


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    assert PROJECT["dynamic"] == ["version"]
    released = re.fullmatch(r"(\d+\.\d+\.\d+)(\.dev\d+)?", lightning_memtrain.__version__)
    assert released
    heading = "## [Unreleased]" if released[2] else f"## [{released[1]}]"
    assert heading in (ROOT / "CHANGELOG.md").read_text()
