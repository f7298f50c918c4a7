"""What an import may load, and what the public names promise."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SUBPACKAGES = [
    "lightning_memtrain",
    *(
        f"lightning_memtrain.{folder.parent.name}"
        for folder in sorted((ROOT / "lightning_memtrain").glob("*/__init__.py"))
        if folder.parent.name != "recipes"
    ),
]
OPTIONAL = ("wandb", "jsonargparse", "sklearn", "fairseq")
CORE_MAY_IMPORT = {
    *sys.stdlib_module_names,
    "torch",
    "lightning",
    "torchmetrics",
    "yaml",
    "lightning_memtrain",
}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def loaded_by(statement: str) -> list[str]:
    """The optional packages that are in memory after ``statement`` ran in a fresh interpreter."""
    done = run_python(
        f"{statement}\nimport sys\nprint([name for name in {OPTIONAL!r} if name in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    return [name for name in OPTIONAL if repr(name) in done.stdout.splitlines()[-1]]


# Names of the package are looked up at their first use, so the import alone would prove little.
@pytest.mark.parametrize("statement", ["import lightning_memtrain", "from lightning_memtrain import *"])
def test_the_package_loads_no_optional_dependency(statement: str) -> None:
    assert loaded_by(statement) == []


def test_the_check_above_can_fail() -> None:
    assert loaded_by("import lightning_memtrain, wandb") == ["wandb"]


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds Lightning, torch, torchmetrics, what these need, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    for distribution in with_requirements(["lightning", "torch", "torchmetrics"]):
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__", "bin") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    (folder / "lightning_memtrain").symlink_to(ROOT / "lightning_memtrain")
    return folder


def with_requirements(names: list[str]) -> list[metadata.Distribution]:
    """The distributions of these names and of all that they require here, each once."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # torch's CUDA packages, where torch is a CPU build
            continue
        required = [Requirement(line) for line in found[name].requires or ()]
        extras = [{"extra": extra} for extra in (*wanted.extras, "")]
        waiting += [
            line
            for line in required
            if line.marker is None or any(line.marker.evaluate(extra) for extra in extras)
        ]
    return list(found.values())


def run_bare(code: str, environment: Path) -> subprocess.CompletedProcess[str]:
    # Without `site` there are neither site-packages nor editable installs.
    command = [sys.executable, "-S", "-c", code]
    variables = {**os.environ, "PYTHONPATH": str(environment)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=environment, env=variables, timeout=120
    )


@pytest.mark.parametrize("subpackage", [name for name in SUBPACKAGES if not name.endswith(".cli")])
def test_the_core_imports_with_nothing_but_lightning_torch_and_torchmetrics(
    subpackage: str, bare_environment: Path
) -> None:
    done = run_bare(f"from {subpackage} import *", bare_environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*OPTIONAL, "rich", "tensorboard", "mlflow"])
def test_the_bare_environment_lacks_all_else(name: str, bare_environment: Path) -> None:
    done = run_bare(f"import {name}", bare_environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{name}'"


def imported_at_once(source: str) -> set[str]:
    """Top-level packages that a module imports when it is imported itself."""
    tree = ast.parse(source)
    statements = [*tree.body]
    for node in tree.body:
        if isinstance(node, (ast.If, ast.Try)) and "TYPE_CHECKING" not in ast.unparse(node).splitlines()[0]:
            statements += ast.walk(node)
    names = [alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in statements if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_the_core_names_no_other_package_at_its_top_level() -> None:
    package = ROOT / "lightning_memtrain"
    sources = [
        path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in ("cli", "recipes")
    ]
    assert len(sources) > 20
    for path in sources:
        assert imported_at_once(path.read_text()) <= CORE_MAY_IMPORT, path


def test_the_check_above_sees_imports_at_the_top_only() -> None:
    source = """
import numpy.linalg
try:
    from wandb import Table
except ImportError:
    pass
if TYPE_CHECKING:
    import rich
def later():
    import sklearn
"""
    assert imported_at_once(source) == {"numpy", "wandb"}


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_every_public_name_exists_and_is_documented(subpackage: str) -> None:
    module = importlib.import_module(subpackage)
    assert module.__doc__, f"{subpackage} has no docstring"
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"{subpackage}.{name} has no docstring"
            assert not value.__doc__.startswith(f"{name}("), (
                f"{subpackage}.{name} only has a generated docstring"
            )


def test_subpackages_list_their_names_once_and_sorted() -> None:
    for subpackage in SUBPACKAGES:
        names = importlib.import_module(subpackage).__all__
        assert len(set(names)) == len(names), subpackage
