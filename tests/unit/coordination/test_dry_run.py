"""What runs in a dry_run is not counted by whoever watches the real step."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_memtrain import MemoryLedger
from lightning_memtrain.coordination import dry_run, dry_run_depth


def test_depth_counts_dry_runs_within_each_other_also_after_an_error() -> None:
    assert dry_run_depth() == 0
    try:
        with dry_run(), dry_run():
            assert dry_run_depth() == 2
            raise ValueError
    except ValueError:
        assert dry_run_depth() == 0


def step(model: nn.Module, batch: torch.Tensor) -> None:
    model(batch).square().sum().backward()


def test_a_ledger_counts_a_real_step_only() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    batch = torch.ones(4, 8)
    with MemoryLedger(model, inputs=batch) as plain:
        step(model, batch)
    model.zero_grad()
    with MemoryLedger(model, inputs=batch) as ledger:
        with dry_run():
            step(model, batch)
            model.zero_grad()
        step(model, batch)
    assert ledger.breakdown() == plain.breakdown()


def test_a_ledger_inside_counts_the_dry_run() -> None:
    model = nn.Linear(8, 4)
    batch = torch.ones(2, 8)
    with MemoryLedger(model, inputs=batch) as outer, dry_run(), FakeTensorMode() as mode:
        fake = mode.from_tensor(batch)
        with MemoryLedger(net := nn.Linear(8, 4), inputs=fake) as inner:
            step(net, fake)
    assert inner.breakdown().maxima.total_bytes > outer.breakdown().maxima.total_bytes
    assert [event.name for event in outer.breakdown().timeline] == ["peak"]


def test_modes_around_see_nothing() -> None:
    with FlopCounterMode(display=False) as counter:
        with dry_run():
            torch.ones(4, 4) @ torch.ones(4, 4)
        assert counter.get_total_flops() == 0
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert counter.get_total_flops() == 2 * 4 * 4 * 4
