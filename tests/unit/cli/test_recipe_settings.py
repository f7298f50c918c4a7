"""`memtrain run RECIPE --help` lists what can be set of the recipe."""

from __future__ import annotations

import inspect

import pytest
from lightning.pytorch import Trainer

from lightning_memtrain.cli import main, recipes
from lightning_memtrain.recipes.cifar10_wrn28_2.module import WideResNetClassifier


def test_all_that_can_be_set_is_listed_with_the_recipes_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "cifar10_wrn28_2", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: memtrain run")
    for name in inspect.signature(WideResNetClassifier).parameters:
        assert f"--model.{name}" in printed
    assert "--data.batch_size=100" in printed
    for name in inspect.signature(Trainer).parameters:
        assert name in printed
    for name in recipes.find("cifar10_wrn28_2").variants:
        assert f"\n  {name} " in printed


def test_a_mistyped_recipe_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "cifar10", "--help"]) == 2
    assert "Did you mean `cifar10_wrn28_2`?" in capsys.readouterr().err
