"""Chunks that are run for real while a plan is made, and what their times change."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_memtrain.checkpointing.selection.step_chain import ChainStage
from lightning_memtrain.ledger.operators.workspace import OpCall, op_call
from lightning_memtrain.planning.fit import search as search_module
from lightning_memtrain.planning.fit.choice.real_times import RealTimes, TimedPair
from lightning_memtrain.planning.fit.choice.sized_steps import OperatorSeconds, SizedStep, SizedSteps
from lightning_memtrain.planning.fit.search import search
from lightning_memtrain.planning.fit.seconds.even_clock import EvenClock, Moment
from lightning_memtrain.planning.fit.seconds.measured_seconds import MeasuredSeconds
from lightning_memtrain.planning.fit.trials.real_rounds import Candidate, RealRounds
from lightning_memtrain.planning.fit.trials.timed_trial import RealSeconds, time_trial
from lightning_memtrain.planning.fit.trials.trial import Trial
from lightning_memtrain.planning.fit.trials.workshop import Workshop
from lightning_memtrain.planning.fit.way import FoundWays
from lightning_memtrain.tracing.device import Device

CPU = Device("cpu", 2**34)


def test_without_real_chunks_nothing_is_corrected():
    real = RealTimes()
    assert (real.of_size(7), real.of_recomputation, real.batch_seconds) == (1.0, 1.0, 0.0)


def test_factors_of_sizes_lie_on_a_line_over_the_logarithm():
    real = RealTimes([TimedPair(4, 2.0, 0.0, 3.0), TimedPair(64, 2.0, 0.0, 2.2)])
    assert (real.of_size(1), real.of_size(4), real.of_size(64), real.of_size(500)) == (1.5, 1.5, 1.1, 1.1)
    assert real.of_size(16) == pytest.approx(1.3)


def test_recomputation_has_a_factor_of_its_own_where_its_size_is_known():
    timed = [TimedPair(8, 2.0, 0.0, 3.0, 0.1), TimedPair(8, 2.0, 1.0, 4.8, 0.3)]
    real = RealTimes(timed)
    assert real.of_size(8) == 1.5
    # 1.2 in the place of 1.0, drawn by a tenth of the step.
    assert real.of_recomputation == pytest.approx((1.2 + 0.2) / (1.0 + 0.2))
    assert real.batch_seconds == pytest.approx(0.2)
    # If nothing ran without it, both have the same.
    alone = RealTimes(timed[1:])
    assert (alone.of_size(8), alone.of_recomputation) == (4.8 / 3, 1.0)


def test_a_slip_of_the_clock_does_not_make_recomputation_cost_nothing():
    timed = [TimedPair(8, 2.0, 0.0, 2.0), TimedPair(8, 2.0, 1.0, 1.5)]
    assert RealTimes(timed).of_recomputation == 0.5


def test_a_curve_has_the_corrected_seconds_and_even_chunks():
    chain = (ChainStage("a", 30, 30, 10, backward_start_bytes=30, own_peak_bytes=10, seconds=1.0),)
    steps = SizedSteps(batch_size=10)
    steps.add(SizedStep(3, 4, chain, 2.0, 0.25, 30))
    steps.real = RealTimes([TimedPair(4, 2.0, 0.0, 3.0, 0.5)])
    curve = steps.curve(3, 4)
    assert curve is not None
    # 10 samples are 2.5 chunks of 4: chunks of 4, 3 and 3 are run.
    assert curve.seconds == 2.5 * 1.5 * 2.0 + 0.5 + 0.25
    assert steps.operator_seconds(3, 4, ()) == OperatorSeconds(5.0, 0.0, 0.25)
    assert steps.operator_seconds(3, 4, (("a",),)) == OperatorSeconds(5.0, 2.5, 0.25)


def candidate(chunk_seconds: float, num_chunks: int = 4) -> Candidate:
    return Candidate(num_chunks, (), (), chunk_seconds)


def test_so_many_chunks_are_watched_that_the_clock_tells_them_apart():
    assert [candidate(seconds, 50).num_watched for seconds in (1.0, 0.03, 0.001)] == [3, 10, 50]
    assert candidate(1.0, 2).num_watched == 2


def test_candidates_run_in_turn_and_the_median_counts():
    first, second = candidate(0.001), candidate(0.002)
    ran: list[Candidate | None] = []

    def run(one: Candidate, most_seconds: float) -> RealSeconds | None:
        ran.append(one)
        return RealSeconds(float(len(ran)), 0.5)

    assert RealRounds(run, 10.0).time([first, second], lambda: ran.append(None)) == [
        RealSeconds(4.0, 0.5),
        RealSeconds(5.0, 0.5),
    ]
    assert ran == [first, second, None] * 3


def test_what_would_take_too_long_is_left_out_and_what_fails_runs_once():
    ran: list[float] = []

    def run(one: Candidate, most_seconds: float) -> RealSeconds | None:
        ran.append(one.chunk_seconds)
        return None

    assert RealRounds(run, 2.0).time([candidate(0.01), candidate(5.0)], list) == [None, None]
    assert ran == [0.01]


class Net(L.LightningModule):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
        self.fails = fails
        self.seen: list[int] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.seen.append(len(batch))
        if self.fails:
            raise ValueError("not today")
        return self.layers(batch.flatten(0, -2)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def batch() -> torch.Tensor:
    return torch.ones(16, 64, 64)


MICROBATCHES = ("lightning_memtrain.Microbatching", {"microbatch_size": 4}, "callbacks")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_timed_trial_says_what_a_chunk_takes_and_leaves_no_trace(num_threads: int):
    model = Net()
    before = [parameter.clone() for parameter in model.parameters()]
    trial = Trial([MICROBATCHES], {}, batch()[:4], batch())
    seconds = time_trial(model, {}, CPU, trial, num_threads, 60.0)
    assert seconds is not None
    assert 0 < seconds.chunk < 5
    assert 0 < seconds.batch < 5
    assert model.seen == []
    assert all(map(torch.equal, before, model.parameters()))


def test_a_trial_that_fails_says_nothing(capfd: Any):
    assert time_trial(Net(fails=True), {}, CPU, Trial([], {}, batch(), batch()), 1, 60.0) is None
    sys.stderr.flush()
    assert "not today" not in capfd.readouterr().err


def test_a_trial_that_does_not_end_is_given_up():
    assert time_trial(Net(), {}, CPU, Trial([], {}, batch(), batch()), 1, 0.0) is None


def found_with(monkeypatch: pytest.MonkeyPatch, seconds_of: dict[bool, float]) -> FoundWays:
    """A search in which real chunks take so many seconds for a sample, by whether they recompute."""
    ran = []

    def run(self: Workshop, one: Candidate, most_seconds: float) -> RealSeconds:
        ran.append(one)
        return RealSeconds(seconds_of[bool(one.segments)] * self.size_of(one.num_chunks), 0.0)

    monkeypatch.setattr(search_module, "_LEAST_REAL_SECONDS", 0.0)
    monkeypatch.setattr(Workshop, "_run_for_real", run)
    plain = search(Net(), batch(), device=CPU, limit_bytes=2**33).plain.allocated_bytes
    assert plain is not None
    found = search(Net(), batch(), device=CPU, limit_bytes=int(0.6 * plain))
    assert ran
    return found


def test_the_fastest_by_real_chunks_is_taken(monkeypatch: pytest.MonkeyPatch):
    found = found_with(monkeypatch, {False: 1.0, True: 3.0})
    assert found.chosen is not None
    assert [one.name for one in found.chosen.techniques] == ["Microbatching"]


def test_a_clock_takes_off_what_fresh_pages_took(monkeypatch: pytest.MonkeyPatch):
    clock = EvenClock(1)
    monkeypatch.setattr(clock, "_of_pages", [0.001, 0.002, 0.5])
    assert clock.between(Moment(1.0, 100), Moment(2.0, 200)) == pytest.approx(0.8)
    assert clock.between(Moment(1.0, 0), Moment(2.0, 2000)) == 0.0  # never negative


def test_of_a_large_operator_a_part_is_measured(monkeypatch: pytest.MonkeyPatch):
    measured = MeasuredSeconds()
    ran: list[tuple[int, ...]] = []

    def run(self: MeasuredSeconds, call: OpCall, num_runs: int) -> float:
        ran.append(call.tensors[0].shape)
        return 0.25

    monkeypatch.setattr(MeasuredSeconds, "_run", run)
    rows = torch.empty(2**16, 256, device="meta")
    call = op_call(torch.ops.aten.relu.default, (rows,), {})
    measured.overhead_seconds = 0.0
    assert measured.seconds([call]) == 0.25 * 2
    assert ran == [(2**15, 256)]
    square = torch.empty(2**13, 2**13, device="meta")
    assert measured.seconds([op_call(torch.ops.aten.relu.default, (square,), {})]) == 0.25
    assert ran[1:] == [(2**13, 2**13)]


def test_an_operator_that_is_measured_again_takes_the_median(monkeypatch: pytest.MonkeyPatch):
    measured = MeasuredSeconds()
    seconds = iter([1.0, 5.0, 2.0])
    monkeypatch.setattr(MeasuredSeconds, "_run", lambda self, call, num_runs: next(seconds))
    measured.overhead_seconds = 0.0
    call = op_call(torch.ops.aten.relu.default, (torch.zeros(4),), {})
    assert measured.seconds([call]) == 1.0
    measured.measure_again([call, call])
    measured.measure_again([call])
    assert measured.seconds([call, call]) == 4.0


def test_a_search_that_is_late_takes_what_it_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search_module, "_LATE_SECONDS", -1.0)
    plain = search(Net(), batch(), device=CPU, limit_bytes=2**33).plain.allocated_bytes
    assert plain is not None
    found = search(Net(), batch(), device=CPU, limit_bytes=int(0.6 * plain))
    assert found.chosen is not None
    assert (found.chosen.allocated_bytes or 0) <= 0.6 * plain
