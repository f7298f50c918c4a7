"""Seconds of operators, each measured once."""

from __future__ import annotations

import pytest
import torch

from lightning_memtrain.core import MIB
from lightning_memtrain.ledger.device_allocator import allocator_statistics
from lightning_memtrain.ledger.operators import op_times
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.ledger.operators.workspace import op_call

add = torch.ops.aten.add.Tensor
mm = torch.ops.aten.mm.default


class Clock:
    """A clock that advances with every operator, by what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
        self.now, self.looks = 0.0, 0
        self._seconds = iter(seconds)
        monkeypatch.setattr(op_times.time, "perf_counter", self)

    def __call__(self) -> float:
        self.looks += 1
        if self.looks % 2 == 0:  # after the operator
            self.now += next(self._seconds)
        return self.now


def call(size: int = 4) -> object:
    return op_call(add, (torch.ones(size), torch.ones(size)), {})


def test_a_short_call_warms_up_and_the_fastest_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [0.010, 0.004, 0.003, 0.005, 0.006])
    assert OpTimes("cpu").seconds([call()]) == pytest.approx(0.003)
    assert clock.looks == 2 * 4  # 22 ms are enough


def test_a_long_call_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [1.5])
    assert OpTimes("cpu").seconds([call()]) == 1.5
    assert clock.looks == 2


def test_equal_calls_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [1.0, 2.0])
    times = OpTimes("cpu")
    assert times.seconds([call(), call(), call(8)]) == 1.0 + 1.0 + 2.0
    assert times.seconds([call(8)]) == 2.0
    assert clock.looks == 4


def test_calls_of_meta_tensors_are_measured_on_the_device() -> None:
    with torch.device("meta"):
        described = op_call(mm, (torch.ones(64, 64), torch.ones(64, 64)), {})
    assert 0 < OpTimes("cpu").seconds([described]) < 1


def test_measuring_holds_one_call_with_its_arguments() -> None:
    with torch.device("meta"):
        x, y = (torch.empty(512, 512) for _ in range(2))
    call = op_call(torch.ops.aten.add.Tensor, (x, y), {})
    allocator = allocator_statistics(torch.device("cpu"))
    assert allocator is not None
    allocator.start()
    OpTimes("cpu").seconds([call])
    reading = allocator.stop()
    assert reading is not None
    random_state = torch.get_rng_state()  # kept meanwhile
    assert reading.over_start_bytes == 3 * MIB + random_state.nbytes


def test_what_cannot_run_alone_counts_nothing_and_is_listed() -> None:
    described = op_call(mm, (torch.ones(2, 3), torch.ones(2, 3)), {})
    times = OpTimes("cpu")
    assert times.seconds([described]) == 0
    assert "RuntimeError" in times.unmeasured[described]


def test_random_numbers_go_on_as_if_nothing_had_been_measured() -> None:
    described = op_call(torch.ops.aten.bernoulli.default, (torch.ones(8),), {})
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    OpTimes("cpu").seconds([described])
    assert torch.equal(torch.rand(3), expected)
