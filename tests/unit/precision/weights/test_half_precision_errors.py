"""Errors of half precision name their layer, their cause, and a way out that leads out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_memtrain.precision.batch_casting import cast_batch
from lightning_memtrain.precision.weights.half_precision_errors import name_layers_in_errors
from lightning_memtrain.precision.weights.model_conversion import convert_to_low_precision_

IS_TARGET = r"is taken for a target, which is not cast.*`LowPrecision\(cast_targets=True\)`"


class Model(LightningModule):
    """Computes what it is made with."""

    def __init__(self, compute: Callable[[Any, Any], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)
        self.compute = compute

    def training_step(me, batch: Any, batch_idx: int) -> Tensor:
        return me.compute(me, batch)


def step(
    model: Model, batch: Any, keep_in_fp32: tuple[str, ...] = ("norm",), cast_targets: bool = False
) -> None:
    """A training step as the plugin runs it."""
    buffers = convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32)
    with name_layers_in_errors(model, keep_in_fp32, cast_targets, buffers.kept):
        model.training_step(cast_batch(batch, torch.bfloat16, cast_targets), 0)


def both(model: Model, batch: Any) -> Tensor:
    first, second = batch
    return model.net(first) + model.net(second)


VIEWS = torch.ones(2, 4), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (
            Model(both, nn.Linear(4, 4)),
            VIEWS,
            rf"Layer 'net.0' \(Linear\).*got float32.*\nIt got a part of .*{IS_TARGET}",
        ),
        (
            Model(lambda m, b: m.net(b[0]) + m.net(b[1] * 2), nn.Linear(4, 4)),
            VIEWS,
            rf"\nCast what it got by `.to\(self.dtype\)`.* made of a part of the batch: .*{IS_TARGET}",
        ),
        (
            Model(both, nn.LayerNorm(4), nn.Linear(4, 4)),
            VIEWS,
            rf"'net.1'.*\nIt got what layer 'net.0' \(LayerNorm\) made of a part of the batch.*{IS_TARGET}",
        ),
        (
            Model(lambda m, b: m.net(b["past_target"]), nn.Linear(4, 4)),
            {"past_target": torch.ones(2, 4)},
            rf"\nIt got a part of the batch that was left in float32: .*{IS_TARGET}",
        ),
        (
            Model(lambda m, b: m.net(b[1])[0], nn.LSTM(4, 4)),
            VIEWS,
            rf"Layer 'net.0' \(LSTM\) computes in half precision.*\nIt got a part of the batch.*{IS_TARGET}",
        ),
    ],
    ids=["itself", "made of it", "through a kept layer", "by its name", "recurrent"],
)
def test_inputs_that_are_taken_for_targets(model: Model, batch: Any, message: str) -> None:
    errors = (RuntimeError, ValueError)
    with pytest.raises(errors, match=message):
        step(model, batch)
    step(model, batch, cast_targets=True)


class CastsToItsNorm(nn.Module):
    """As Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(x.to(self.norm.weight.dtype)))


def test_a_layer_whose_dtype_the_model_follows() -> None:
    model = Model(lambda m, b: m.net(b), nn.Linear(4, 4), CastsToItsNorm())
    with pytest.raises(
        RuntimeError,
        match=r"Layer 'net.1.mixer' \(Linear\) computes in half precision, but got float32: .*\nIt got "
        r"what layer 'net.1.norm' \(RMSNorm\) made, which "
        r"`LowPrecision\(keep_in_fp32=\(\"norm\", \"net.0\*\"\)\)` keeps in float32.*by "
        r"`LowPrecision\(keep_in_fp32=\(\"net.0\*\",\)\)`\.$",
    ):
        step(model, torch.ones(2, 4), ("norm", "net.0*"))
    step(model, torch.ones(2, 4), ())


def test_a_layer_whose_dtype_the_model_follows_after_kept_ones_only() -> None:
    model = Model(lambda m, b: m.net(b), nn.Embedding(3, 4), CastsToItsNorm())
    with pytest.raises(
        RuntimeError,
        match=r"It got what layer 'net.1.norm' \(RMSNorm\) made.*keep_in_fp32=\(\"net.0\",\)\)`\.$",
    ):
        step(model, torch.tensor([1, 2]), ("norm", "net.0"))
    step(model, torch.tensor([1, 2]), ("net.0",))


class Standardizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.layer = nn.Linear(4, 40)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.layer(x - self.mean)


def test_a_buffer_that_stays_in_float32() -> None:
    model = Model(lambda m, b: m.net(b), Standardizes())
    with pytest.raises(
        RuntimeError,
        match=r"Layer 'net.0.layer'.*\nCast what it got by .* made with a buffer that stays in float32, "
        r"since it counts, averages or holds whole numbers \('net.0.mean'\), keep the layer of that",
    ):
        step(model, torch.ones(2, 4))
    step(model, torch.ones(2, 4), ("norm", "net.0"))


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x.T @ x + torch.eye(4, dtype=x.dtype))


def test_the_advice_names_all_layers_so_far_and_leads_out() -> None:
    keep: list[str] = ["norm"]
    for name in ("net.1", "net.2"):
        with pytest.raises(RuntimeError, match=r"cannot compute in half precision: .*BFloat16") as caught:
            step(
                Model(lambda m, b: m.net(b), nn.Linear(4, 4), Inverse(), Inverse()),
                torch.ones(2, 4),
                tuple(keep),
            )
        (advised,) = re.findall(r"LowPrecision\(keep_in_fp32=\((.*?)\)\)", str(caught.value))
        assert advised == ", ".join(f'"{known}"' for known in (*keep, name))
        keep = advised.replace('"', "").split(", ")
    step(Model(lambda m, b: m.net(b), nn.Linear(4, 4), Inverse(), Inverse()), torch.ones(2, 4), tuple(keep))


def test_an_error_outside_of_any_layer_stays() -> None:
    def missing(model: Model, batch: Tensor) -> Tensor:
        return torch.linalg.inv(batch)

    with pytest.raises(
        RuntimeError, match=r"^Model cannot compute in half precision.*\nPut what failed into a"
    ):
        step(Model(missing), torch.ones(4, 4))
    with pytest.raises(RuntimeError, match=r"^boom in bfloat16$"):
        raise_in(nn.Linear(2, 2))


def raise_in(model: nn.Module) -> None:
    with name_layers_in_errors(nn.Linear(2, 2), ("norm",), False):
        raise RuntimeError("boom in bfloat16")
