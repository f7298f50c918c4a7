"""Where the search ends: whose code is followed, and whose objects are looked into."""

from __future__ import annotations

import logging
import sys
import threading
import types
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_memtrain import Microbatching, SparseTraining
from lightning_memtrain.tracing import UserState
from lightning_memtrain.tracing.user_state import boundaries


@pytest.mark.parametrize("name", ["collections.abc", "torch.nn", "wandb.sdk", "builtins", "", None, 3])
def test_code_of_large_libraries_is_foreign(name: Any) -> None:
    assert boundaries.is_foreign(name)


@pytest.mark.parametrize("name", ["__main__", "transformers.models.bert", "torch_project", __name__])
def test_code_of_users_is_not(name: str) -> None:
    assert not boundaries.is_foreign(name)


def test_a_users_file_may_have_a_name_of_pythons_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("nntplib")
    module.__file__ = "/home/user/project/nntplib.py"
    name = next(name for name in sorted(sys.stdlib_module_names) if name not in sys.modules)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(boundaries, "_is_of_python", boundaries._is_of_python.__wrapped__)
    assert not boundaries.is_foreign(f"{name}.part")
    monkeypatch.delitem(sys.modules, name)
    assert boundaries.is_foreign(f"{name}.part")


def of_module(name: str, *bases: type) -> type:
    return type("Heir", bases, {"__module__": name})


@pytest.mark.parametrize(
    "cls",
    [
        *(threading.Lock, threading.Thread, logging.Logger, DataLoader, torch.cuda.Stream, Microbatching),
        *(of_module("wandb.sdk.run"), of_module("pandas"), of_module("mine", threading.Thread)),
        *(pl.callbacks.ModelCheckpoint, pl.loggers.CSVLogger, of_module("mine", pl.loggers.CSVLogger)),
        of_module("pytorch_lightning.loggers.wandb"),
    ],
)
def test_what_stands_for_something_outside_is_left_alone(cls: Any) -> None:
    assert boundaries.is_left_alone(cls if isinstance(cls, type) else type(cls()))


@pytest.mark.parametrize(
    "cls",
    [
        *(nn.Linear, torch.optim.SGD, torch.distributions.Normal, torch.amp.GradScaler, SparseTraining),
        *(of_module("mine", Dataset), of_module("mine", pl.Callback), of_module("mine", list)),
        *(of_module("torch.distributed.fsdp", nn.Module), types.SimpleNamespace),
    ],
)
def test_what_a_step_changes_is_looked_into(cls: type) -> None:
    assert not boundaries.is_left_alone(cls)


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_trainer_is_known_by_both_names_of_its_package(package: str) -> None:
    trainer = type("Trainer", (), {"__module__": f"{package}.trainer.trainer"})
    assert boundaries.is_lightnings(of_module("mine", trainer), "Trainer")
    assert not boundaries.is_lightnings(type("Trainer", (), {"__module__": "mine"}), "Trainer")


def test_code_of_a_tracker_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = types.ModuleType("wandb")
    exec("NUM = 0\ndef log():\n    global NUM\n    NUM += 1", tracker.__dict__)
    monkeypatch.setitem(globals(), "wandb", tracker)

    def step() -> None:
        wandb.log()  # type: ignore[name-defined]  # noqa: F821

    state = UserState(step)
    step()
    state.restore()
    assert tracker.NUM == 1
