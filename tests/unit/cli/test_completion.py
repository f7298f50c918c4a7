"""What a shell is told to complete."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lightning_memtrain.cli import main
from lightning_memtrain.cli.parsing.completion import script


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([""], {"run", "report", "profile", "completion"}),
        (["pr"], {"predict", "profile"}),
        (["run", "cif"], {"cifar10_wrn28_2"}),
        (
            ["run", "cifar10_wrn28_2", "--variant", "microbatched"],
            {"microbatched", "microbatched+checkpointed"},
        ),
        (["report", "--o"], {"--open"}),
        (["completion", "z"], {"zsh"}),
        (["run", "cifar10_wrn28_2", "--run-dir", ""], set()),
        (["nothing", ""], set()),
    ],
)
def test_candidates(words: list[str], found: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["__complete", *words]) == 0
    printed = {word for word in capsys.readouterr().out.split() if word}
    assert printed >= found
    assert bool(printed) == bool(found)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_one_that_the_shell_reads(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == script(shell) + "\n"
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n", "-c", script(shell)], check=True, timeout=20)
