"""Buffers that count or average are told from those that are constants or queues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memtrain.precision.weights.buffer_usage import BufferUsage, holds_whole_numbers


def ema_inplace(average: Tensor, new: Tensor, decay: float) -> None:
    average.mul_(decay).add_(new, alpha=1 - decay)


class Parent(nn.Module):
    def count(self, x: Tensor) -> None:
        self.inherited += len(x)


class Model(Parent):
    """One buffer for each way to write it; names that begin with ``n`` are not accumulated."""

    names = (
        *(
            "plus",
            "by_data",
            "chained",
            "part",
            "formula",
            "copied",
            "sliced",
            "helped",
            "aliased",
            "out",
            "where",
        ),
        *("running_mean", "inherited", "lerped", "indexed"),
        *("never", "n_queue", "n_moved", "n_cut", "n_copied", "n_filled", "n_lazy", "n_setup"),
    )

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.register_buffer(name, torch.zeros(4))
        self.n_setup = self.n_setup + 1

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        self.plus += 1
        self.by_data.data.add_(x.sum(0))
        self.chained.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.part[1:].sub_(1)
        self.formula = 0.9 * self.formula + 0.1 * x.mean(0)
        self.copied.copy_(self.copied * 0.9 + x.mean(0))
        self.sliced[:2] = self.sliced[:2] + 1
        ema_inplace(self.helped, x.mean(0), 0.9)
        average = self.aliased
        average.lerp_(x.mean(0), 0.1)
        torch.add(self.out, 1, out=self.out)
        self.where.index_add_(0, torch.tensor([0]), x[0])
        self.lerped = torch.lerp(self.lerped, x.mean(0), 0.1)
        self.indexed[torch.tensor([0])] += 1
        self.n_queue[0] = x[0, 0]
        self.n_moved = self.n_moved.to(x.device)
        self.n_cut = self.n_cut[: 2 * 2]
        self.n_copied.copy_(x[0] + 1)
        self.n_filled.zero_()
        self.n_lazy = x.cos()
        return F.batch_norm(x, self.running_mean, None, training=True) + self.never

    def reset_parameters(self) -> None:
        self.never += 1


@pytest.mark.parametrize("name", Model.names)
def test_what_code_does_with_a_buffer(name: str) -> None:
    model = Model()
    usage = BufferUsage(model)
    assert usage.accumulates(model, name) is (not name.startswith("n"))
    assert usage.overwrites(model, name) is (name.startswith("n_") and name != "n_setup")


def test_operators_that_want_one_dtype() -> None:
    model = Model()
    usage = BufferUsage(model)
    strict = {name for name in Model.names if usage.accumulates_strictly(model, name)}
    assert strict == {"helped", "aliased", "out", "where", "running_mean"}


class Meter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("kept", torch.zeros(3))


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.meter, self.other, self.meters = Meter(), Meter(), nn.ModuleList([Meter()])

    def forward(self, x: Tensor) -> Tensor:
        self.meter.seen += 1
        for one in self.meters:
            one.kept += 1
        return x


def test_buffers_that_other_modules_write() -> None:
    owner = Owner()
    usage = BufferUsage(owner)
    assert usage.accumulates(owner.meter, "seen")
    assert not usage.accumulates(owner.other, "seen")
    assert usage.accumulates(owner.meters[0], "kept")


def test_without_text_nothing_is_known() -> None:
    names: dict[str, Any] = {"Meter": Meter}
    exec("class Made(Meter):\n    def forward(self, x):\n        self.seen += 1\n        return x", names)
    made = names["Made"]()
    assert not BufferUsage(made).accumulates(made, "seen")


@pytest.mark.parametrize(
    ("values", "in_bfloat16", "in_float16"),
    [
        (torch.arange(257.0), False, False),
        (torch.arange(260.0), True, False),
        (torch.arange(2052.0), True, True),
        (torch.tensor([0.5, 1001.0, 1003.0]), False, False),
        (torch.tensor([0.0, -10001.0, -10001.0]), False, False),
        (torch.tensor([0.0, -1e9, float("-inf")]), False, False),
        (torch.zeros(0), False, False),
        (torch.arange(300.0, device="meta"), False, False),
    ],
    ids=str,
)
def test_whole_numbers_that_a_dtype_lacks(values: Tensor, in_bfloat16: bool, in_float16: bool) -> None:
    assert holds_whole_numbers(values, torch.bfloat16) is in_bfloat16
    assert holds_whole_numbers(values, torch.float16) is in_float16
