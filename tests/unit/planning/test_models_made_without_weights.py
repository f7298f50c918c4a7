"""A model that a function makes has no weights, but its code may ask for what does not depend on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.core import Category
from lightning_memtrain.planning import Device, predict

GPU = Device("gpu", 2**40, compute_capability=(8, 0))
WIDTH = 1024
BATCH = torch.ones(2, WIDTH)


class Net(pl.LightningModule):
    """One layer, and what a test does when it is made."""

    def __init__(self, change: Callable[[Any], None] = lambda net: None) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)
        change(self)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def by_rates(net: Any) -> None:
    rates = [rate.item() for rate in torch.linspace(0, 0.5, 6)]  # dropout by depth
    assert rates[-1] == 0.5
    net.rates = nn.ModuleList(nn.Dropout(rate) for rate in rates)


def by_numpy(net: Any) -> None:
    net.layer.weight.data.copy_(torch.from_numpy(np.ones((WIDTH, WIDTH), dtype=np.float32)))
    net.register_buffer("table", torch.tensor(np.arange(8)))
    assert net.table.tolist() == list(range(8))


def by_values(net: Any) -> None:
    net.register_buffer("scale", torch.tensor([1.0, 3.0]))
    assert int(net.scale.sum()) == 4
    net.layer.weight.data = torch.full((WIDTH, WIDTH), 0.5)
    net.layer.weight.data[0] = torch.tensor(2.0)


def by_masks(net: Any) -> None:
    net.register_buffer("mask", torch.tril(torch.ones(64, 64, dtype=torch.bool)))
    assert net.mask.sum().item() == 64 * 65 // 2


def by_orthogonal(net: Any) -> None:
    nn.init.orthogonal_(net.layer.weight)
    nn.init.trunc_normal_(net.layer.weight, std=0.02)


def by_parametrization(net: Any) -> None:
    net.layer = nn.utils.parametrizations.weight_norm(net.layer)


@pytest.mark.parametrize(
    "change", [by_rates, by_numpy, by_values, by_masks, by_orthogonal, by_parametrization]
)
def test_what_programs_do_when_they_make_a_model(change: Callable[[Any], None]) -> None:
    prediction = predict(lambda: Net(change), BATCH, device=GPU)
    assert prediction.unknown == ()
    assert prediction.breakdown.at_peak[Category.PARAMETERS] - 4 * WIDTH * WIDTH in (0, 4 * WIDTH)


def test_weights_that_are_loaded_from_a_file(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "weights.pt")

    def load(net: Any) -> None:
        net.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)

    loaded = predict(lambda: Net(load), BATCH, device=GPU)
    assert loaded.allocated_bytes == predict(Net, BATCH, device=GPU).allocated_bytes


def line_of(function: Callable[..., Any], text: str) -> str:
    """Where ``text`` is in a function."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = (at for at, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(function)}:{first + offset}"


def test_a_choice_by_random_weights_names_its_line() -> None:
    def choose(net: Any) -> None:
        if net.layer.weight.sum() > 0:  # nobody knows
            net.layer.weight.data.neg_()

    with pytest.raises(ValueError, match="asks for the value of a tensor") as error:
        predict(lambda: Net(choose), BATCH, device=GPU)
    assert line_of(choose, "nobody knows") in str(error.value)


def test_a_number_of_random_weights_is_reported_with_its_line() -> None:
    def look(net: Any) -> None:
        net.spread = net.layer.weight.std().item()  # only looked at

    (unknown,) = predict(lambda: Net(look), BATCH, device=GPU).unknown
    assert unknown.endswith(line_of(look, "only looked at"))


def test_layers_of_configure_model_have_no_weights_either() -> None:
    class Late(Net):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)

        def configure_model(self) -> None:
            self.layer = nn.Linear(WIDTH, 2**28, bias=False)  # 1 TiB

    prediction = predict(Late, BATCH, device=GPU)
    assert prediction.breakdown.at_peak[Category.PARAMETERS] == 2**40
    assert not prediction.fits
