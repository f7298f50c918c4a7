"""Build the packages and use the wheel as a stranger would: ``make wheel-check``.

The sdist is built from the checkout and the wheel from the sdist; the wheel is installed with the extra
``recipes`` into a fresh environment outside of the checkout, and two steps of a recipe are trained there.
No test runner: this runs for a minute and needs the package index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "cifar10_wrn28_2"
IN_WHEEL = (
    "lightning_memtrain/__init__.py",
    "lightning_memtrain/py.typed",
    "lightning_memtrain/report/outputs/report.html",
    "lightning_memtrain/recipes/__init__.py",
    f"lightning_memtrain/recipes/{RECIPE}/__init__.py",
    f"lightning_memtrain/recipes/{RECIPE}/README.md",
)
IN_SDIST = (
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    "recipes",
    "tests",
    "docs",
    "benchmarks",
)


def run(command: list[str | Path], cwd: Path) -> str:
    """Output of ``command``; its whole output and the exit if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout


def check(holds: bool, complaint: str) -> None:
    """End with ``complaint`` unless ``holds``: an assert would go under ``python -O``."""
    if not holds:
        sys.exit(f"wheel check: {complaint}")


def check_contents(wheel: Path, sdist: Path) -> None:
    """What must be in the packages is there, and nothing else is."""
    in_wheel = zipfile.ZipFile(wheel).namelist()
    for path in IN_WHEEL:
        check(path in in_wheel, f"{path} is missing from {wheel.name}")
    top = {PurePosixPath(path).parts[0] for path in in_wheel}
    metadata = f"{wheel.name.rsplit('-', 3)[0]}.dist-info"
    check(top == {"lightning_memtrain", metadata}, f"{wheel.name} holds {sorted(top)} at its top level")
    configs = [
        path
        for path in in_wheel
        if path.startswith(f"lightning_memtrain/recipes/{RECIPE}/") and path.endswith(".yaml")
    ]
    check(bool(configs), f"{wheel.name} holds no YAML file of the recipe {RECIPE}")

    with tarfile.open(sdist) as archive:
        in_sdist = {PurePosixPath(path).parts[1] for path in archive.getnames() if "/" in path}
    for path in IN_SDIST:
        check(path in in_sdist, f"{path} is missing from {sdist.name}")


def main() -> None:
    """Build, check, install, train; exits with a complaint at the first thing that is wrong."""
    with tempfile.TemporaryDirectory(prefix="memtrain-wheel-") as scratch:
        elsewhere = Path(scratch)
        run(
            [sys.executable, "-m", "build", "--no-isolation", "--outdir", elsewhere / "dist", ROOT],
            cwd=elsewhere,
        )
        (wheel,) = (elsewhere / "dist").glob("*.whl")
        (sdist,) = (elsewhere / "dist").glob("*.tar.gz")
        check_contents(wheel, sdist)
        print(f"built {wheel.name} ({wheel.stat().st_size / 2**10:.0f} KiB) and {sdist.name}")

        venv.create(elsewhere / "env", with_pip=True)
        python, memtrain = elsewhere / "env/bin/python", elsewhere / "env/bin/memtrain"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        run([*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[recipes]"], cwd=elsewhere)

        where = run(
            [python, "-c", "import lightning_memtrain as m; print(m.__file__, *m.__path__)"], cwd=elsewhere
        )
        check(
            all(Path(path).is_relative_to(elsewhere / "env") for path in where.split()),
            f"the wheel was installed into {elsewhere / 'env'}, but {where.strip()} was imported",
        )
        listed = run([memtrain, "recipes"], cwd=elsewhere)
        check(RECIPE in listed, f"`memtrain recipes` does not list {RECIPE}:\n{listed}")
        run([memtrain, "run", RECIPE, "--variant", "smoke", "--trainer.max_steps=2"], cwd=elsewhere)
        written = (path for path in elsewhere.rglob("memory_report.*") if "env" not in path.parts)
        reports = sorted({path.name for path in written})
        check(reports == ["memory_report.html", "memory_report.json"], f"the run wrote the reports {reports}")
        print("installed the wheel elsewhere, listed its recipes and trained two steps with it")


if __name__ == "__main__":
    main()
