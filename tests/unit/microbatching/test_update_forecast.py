"""What the step of an optimizer will hold is what it then does hold, to the byte."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.microbatching.automatic_size.update_forecast import (
    UpdateForecast,
    clipping,
    forecast_update,
    update_signature,
)
from tests.helpers.trainers import quiet_trainer

CPU = torch.device("cpu")
OPTIM = torch.optim

OPTIMIZERS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (kind, {**options, "foreach": foreach})
    for foreach in (None, False, True)
    for kind, options in (
        (OPTIM.SGD, {"lr": 0.1}),
        (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (OPTIM.Adam, {}),
        (OPTIM.Adam, {"weight_decay": 0.1, "amsgrad": True}),
        (OPTIM.AdamW, {}),
        (OPTIM.RMSprop, {"momentum": 0.9}),
        (OPTIM.NAdam, {}),
        (OPTIM.RAdam, {}),
        (OPTIM.Adadelta, {}),
        (OPTIM.Rprop, {}),
        (OPTIM.ASGD, {}),
        (OPTIM.Adamax, {}),
        (OPTIM.Adagrad, {}),
    )
]
OPTIMIZERS += [(kind, {"fused": True}) for kind in (OPTIM.SGD, OPTIM.Adam, OPTIM.AdamW)]
if hasattr(OPTIM, "Adafactor"):
    OPTIMIZERS.append((OPTIM.Adafactor, {}))


def stepped(kind: type[Optimizer], options: dict[str, Any], num_steps: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10), nn.Linear(10, 5).requires_grad_(False))
    unused = nn.Parameter(torch.ones(100))
    optimizer = kind([*model.parameters(), unused], **options)
    model(torch.randn(4, 20)).sum().backward()
    for _ in range(num_steps):
        optimizer.step()
    return model, optimizer


def really(model: nn.Module, optimizer: Optimizer, before: Any, num_steps: int = 2) -> tuple[int, int]:
    with MemoryLedger(model, optimizer) as ledger:
        for _ in range(num_steps):
            before(optimizer)
            optimizer.step()
    held = ledger.breakdown()
    return held.end_bytes - held.start_bytes, held.ledger_peak_bytes - held.start_bytes


def clip(optimizer: Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)


@pytest.mark.parametrize("num_steps", [0, 1])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=str)
def test_the_forecast_is_what_the_step_holds(kind: type[Optimizer], options: dict[str, Any], num_steps: int):
    model, optimizer = stepped(kind, options, num_steps)
    before = copy.deepcopy(optimizer.state_dict())
    forecast = forecast_update([optimizer], CPU, clip)
    assert forecast.unknown == ""
    assert str(optimizer.state_dict()) == str(before)
    assert (forecast.kept_bytes, forecast.over_bytes) == really(model, optimizer, clip)


class Lookahead(Optimizer):
    """Around another optimizer; copies all weights in its third step, and counts in a dictionary."""

    total_steps = 0

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.counts = {"steps": 0}
        self.slow: list[Tensor] = []
        super().__init__(inner.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.counts["steps"] += 1
        type(self).total_steps += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.counts["steps"]
        if self.counts["steps"] == 3:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.slow = [parameter.clone() for parameter in parameters]
        return loss


def test_an_optimizer_with_state_of_its_own_is_left_as_it_is_and_looked_at_further_ahead():
    model, inner = stepped(OPTIM.SGD, {"lr": 0.1, "momentum": 0.9}, 0)
    optimizer = Lookahead(inner)
    forecast = forecast_update([optimizer], CPU)
    assert (optimizer.counts, optimizer.slow, Lookahead.total_steps) == ({"steps": 0}, [], 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    assert not inner.state
    trained = 4 * (20 * 30 + 30 + 30 * 10 + 10)
    all_bytes = 4 * sum(p.numel() for group in inner.param_groups for p in group["params"])
    assert (forecast.kept_bytes, forecast.over_bytes) == (trained + all_bytes, trained + all_bytes)
    assert really(model, optimizer, lambda _: None, num_steps=3) == (trained + all_bytes,) * 2


def test_an_optimizer_that_evaluates_the_model_is_not_looked_at():
    _, optimizer = stepped(OPTIM.LBFGS, {}, 0)
    forecast = forecast_update([optimizer], CPU)
    signature = update_signature([optimizer])
    assert forecast == UpdateForecast(
        signatures=(signature,), unknown="LBFGS evaluates the model in its step"
    )


def test_an_optimizer_that_cannot_step_without_data_says_why():
    class Stubborn(OPTIM.SGD):
        def step(self, closure: Any = None) -> None:
            raise ValueError("needs numbers\nreal ones")

    _, optimizer = stepped(Stubborn, {"lr": 0.1}, 0)
    assert forecast_update([optimizer], CPU).unknown == "ValueError: needs numbers"


def test_hooks_and_schedulers_do_not_notice():
    _, optimizer = stepped(OPTIM.SGD, {"lr": 0.1}, 0)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    scheduler = OPTIM.lr_scheduler.StepLR(optimizer, 1)
    forecast = forecast_update([optimizer], CPU)
    assert (forecast.unknown, called, scheduler.get_last_lr()) == ("", [], [0.1])


def test_random_numbers_are_those_that_would_have_come():
    class Noisy(OPTIM.SGD):
        def step(self, closure: Any = None) -> None:
            self.noise = torch.randn(100)

    _, optimizer = stepped(Noisy, {"lr": 0.1}, 0)
    state = torch.get_rng_state()
    forecast = forecast_update([optimizer], CPU)
    assert (forecast.kept_bytes, forecast.over_bytes) == (400, 800)  # the new one is made beside the old one
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(optimizer, "noise")


# ---------------------------------------------------------------------- signatures


def changed(**values: Any) -> bool:
    _, optimizer = stepped(OPTIM.SGD, {"lr": 0.1}, 0)
    before = update_signature([optimizer])
    optimizer.param_groups[0].update(values)
    return update_signature([optimizer]) != before


def test_what_may_make_another_step_of_it_changes_its_signature():
    assert changed(momentum=0.9)
    assert changed(weight_decay=1e-4)
    assert changed(params=[nn.Parameter(torch.ones(1))])
    assert not changed(lr=0.0)
    assert not changed(momentum=0)


def test_the_forecast_knows_the_signatures_of_the_coming_steps():
    class Counts(OPTIM.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1

    _, optimizer = stepped(Counts, {"lr": 0.1}, 0)
    forecast = forecast_update([optimizer], CPU)
    assert forecast.signatures[0] == update_signature([optimizer])
    optimizer.step()
    assert forecast.signatures[1:] == (update_signature([optimizer]),)


# ---------------------------------------------------------------------- clipping


class OwnClipping(BoringModel):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("is not to be called")


@pytest.mark.parametrize(
    ("model", "options", "largest"),
    [
        (BoringModel, {}, 8.0),
        (BoringModel, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, 0.5),
        (BoringModel, {"gradient_clip_val": 0.5}, 0.25),
        (OwnClipping, {}, 0.5),
    ],
)
def test_gradients_are_clipped_as_the_trainer_does(
    model: type[LightningModule], options: dict[str, Any], largest: float, tmp_path: Path
):
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 8.0)
    optimizer = OPTIM.SGD([weight])
    clipping(quiet_trainer(tmp_path, **options), model())(optimizer)
    torch.testing.assert_close(weight.grad, torch.full((4,), largest))


def test_gradients_that_are_not_there_yet_may_be_taken_for_granted():
    model, optimizer = stepped(OPTIM.AdamW, {}, 0)
    expected = forecast_update([optimizer], CPU, clip)
    unused = optimizer.param_groups[0]["params"].pop()
    for parameter in (*model.parameters(), unused):
        parameter.grad = None
    assert forecast_update([optimizer], CPU, clip)[:2] == (0, 4)  # the norm of nothing
    assert forecast_update([optimizer], CPU, clip, every_gradient=True)[:2] == expected[:2]
    assert all(parameter.grad is None for parameter in model.parameters())
