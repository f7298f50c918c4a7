"""What only reads files, or lists what is known, does not wait for torch and Lightning to be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import environment
from tests.helpers.reports import tiny_report

_PRINT_HEAVY = "import sys; print([n for n in ('torch', 'lightning', 'numpy', 'wandb') if n in sys.modules])"


def heavy_after(arguments: list[str]) -> tuple[str, list[str]]:
    """What a command prints, and which slow packages it has imported."""
    code = f"from lightning_memtrain.cli import main\nassert main({arguments!r}) == 0\n{_PRINT_HEAVY}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return "\n".join(printed), json.loads(last.replace("'", '"'))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_report().save(tmp_path / "run" / "memory" / "memory_report.json")
    return tmp_path / "run"


def test_a_report_is_printed_without_torch(run: Path) -> None:
    printed, heavy = heavy_after(["report", str(run)])
    assert "Memory report" in printed
    assert heavy == []


def test_runs_are_compared_without_torch(run: Path) -> None:
    page = run / "page.html"
    printed, heavy = heavy_after(["compare", str(run), str(run / "memory"), "--page", str(page)])
    assert "at the peak" in printed
    assert page.is_file()
    assert heavy == []


def test_devices_are_listed_without_torch_where_no_driver_is() -> None:
    printed, heavy = heavy_after(["devices"])
    assert "RTX 4090 24GB" in printed
    if not any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        assert heavy == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["run", "cifar10_wrn28_2", "--run-dir"], "the run folder"),
        (["demo", "--run-dir"], "the run folder"),
        (["copy", "cifar10_wrn28_2"], "the copy"),
        (["compare", "RUN", "RUN", "--page"], "the page's folder"),
        (["plan", "cifar10_wrn28_2", "--output"], "the plan's folder"),
        (["profile", "cifar10_wrn28_2", "--output"], "the report's folder"),
    ],
)
def test_what_cannot_be_written_is_said_at_once_and_in_one_line(
    arguments: list[str], what: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    filled = [{"RUN": str(run)}.get(argument, argument) for argument in arguments]
    filled.append(str(tmp_path / "file" / "in"))
    code = (
        f"from lightning_memtrain.cli import main\ncode = main({filled!r})\n"
        f"{_PRINT_HEAVY}\nassert code == 1, code"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"memtrain: error: {what} `{tmp_path}/file")
    assert line.endswith("it is no folder. Name another one.")
    assert done.stdout == "[]\n"


def test_the_checks_above_can_fail() -> None:
    code = f"import lightning_memtrain.report.profiler\n{_PRINT_HEAVY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert "torch" in done.stdout
