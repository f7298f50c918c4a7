"""Fake tensors are no bytes of a step, whenever and wherever a technique makes them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from lightning_memtrain import MemoryLedger
from lightning_memtrain.coordination import annotate, dry_run


@pytest.fixture(autouse=True)
def collected_late() -> Iterator[None]:
    """What is in a reference cycle stays until the test is over."""
    gc.disable()
    yield
    gc.enable()


def made() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    return model, torch.optim.Adam(model.parameters()), torch.ones(4, 8)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def twins(mode: FakeTensorMode, model: nn.Module, batch: torch.Tensor) -> dict[str, Any]:
    """Fake parameters and a fake batch, in a reference cycle."""
    fakes: dict[str, Any] = {"batch": mode.from_tensor(batch)}
    for name, parameter in model.named_parameters():
        fakes[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
    fakes["itself"] = fakes
    return fakes


def fake_step(mode: FakeTensorMode, model: nn.Module, fakes: dict[str, Any]) -> None:
    parameters = {name: fake for name, fake in fakes.items() if name not in ("batch", "itself")}
    with mode:
        functional_call(model, parameters, (fakes["batch"],)).square().mean().backward()
        torch.optim.Adam(parameters.values()).step()


def two_steps(with_dry_run: bool, converted_outside: bool = False) -> MemoryLedger:
    model, optimizer, batch = made()
    mode, fakes = FakeTensorMode(), None
    with MemoryLedger(model, optimizer, batch) as ledger:
        step(model, optimizer, batch)
        if converted_outside:
            fakes = twins(mode, model, batch)
        if with_dry_run:
            with dry_run():
                fakes = fakes or twins(mode, model, batch)
                fake_step(mode, model, fakes)
        if converted_outside:
            gradient = fakes["0.weight"].grad
            assert (gradient @ gradient.t()).sum().shape == ()
            del gradient
        del fakes
        step(model, optimizer, batch)
    assert ledger.survivors() == ()
    return ledger


@pytest.mark.parametrize("converted_outside", [False, True], ids=["all inside", "converted and used outside"])
def test_a_dry_run_with_fake_tensors_adds_nothing(converted_outside: bool) -> None:
    assert two_steps(True, converted_outside).breakdown() == two_steps(False).breakdown()


def test_fakes_count_where_they_are_what_is_trained() -> None:
    model, optimizer, batch = made()
    with MemoryLedger(model, optimizer, batch) as real:
        step(model, optimizer, batch)
    mode = FakeTensorMode()
    with mode:
        model, optimizer, batch = made()
        with MemoryLedger(model, optimizer, batch) as outside:
            step(model, optimizer, batch)
    with dry_run(), mode:
        model, optimizer, batch = made()
        with MemoryLedger(model, optimizer, batch) as inside:
            step(model, optimizer, batch)
    assert outside.breakdown() == inside.breakdown() == real.breakdown()


def test_marks_and_optimizer_steps_of_a_dry_run_are_not_on_the_timeline() -> None:
    model, optimizer, batch = made()
    with MemoryLedger(model, optimizer, batch) as ledger:
        annotate("microbatch 1 of 1")
        with dry_run():
            annotate("microbatch 1 of 8")
            optimizer.step()
    names = [event.name for event in ledger.breakdown().timeline if not event.name.startswith("peak")]
    assert names == ["microbatch 1 of 1"]
