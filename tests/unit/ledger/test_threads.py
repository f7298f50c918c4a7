"""A ledger counts what its own thread does, whatever others do meanwhile, and is read at any moment."""

from __future__ import annotations

import gc
import io
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memtrain import MemoryLedger
from lightning_memtrain.coordination import annotate
from lightning_memtrain.core import Category
from lightning_memtrain.ledger import OpWorkspace

FLOAT = 4


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def made() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.ones(16, 4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Elsewhere:
    """Runs something again and again in another thread, and hands on what it raised."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._over = False
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._go)
        self._error: BaseException | None = None

    def __enter__(self) -> Elsewhere:
        self._thread.start()
        assert self._began.wait(60)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _go(self) -> None:
        try:
            while not self._over:
                self._run()
                self._began.set()
        except BaseException as error:
            self._error = error
            self._began.set()


def reads(ledger: MemoryLedger) -> None:
    ledger.survivors()
    ledger.breakdown()
    assert ledger.current_bytes >= 0


# ---------------------------------------------------------------------- the garbage collector


def in_cycles(num_tensors: int) -> None:
    """Tensors in reference cycles, as exceptions and closures make them."""
    for _ in range(num_tensors):
        cycle: list[Any] = [torch.zeros(2)]
        cycle.append(cycle)


@pytest.fixture
def kept_threshold() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.enable()


@pytest.mark.usefixtures("kept_threshold")
@pytest.mark.parametrize("what", ["survivors", "breakdown", "current_bytes"])
def test_a_ledger_is_read_while_garbage_is_collected(what: str) -> None:
    with MemoryLedger(nn.Linear(4, 4)) as ledger:
        keep = [torch.zeros(2) for _ in range(2000)]
        gc.collect()
        gc.disable()
        in_cycles(40)
        gc.set_threshold(gc.get_count()[0] + 500)  # in the midst of what is read
        gc.enable()
        value = getattr(ledger, what)
        if callable(value):
            value()
        gc.collect()
        assert ledger.current_bytes == 20 * FLOAT + 2000 * 2 * FLOAT
    assert len(ledger.survivors()) == len(keep)


@pytest.mark.usefixtures("kept_threshold")
def test_a_prediction_is_right_when_garbage_is_collected_meanwhile() -> None:
    with MemoryLedger(nn.Linear(4, 4), workspace=OpWorkspace("cpu")) as ledger:
        gc.set_threshold(1)  # with nearly every object
        in_cycles(100)
        gc.collect()
    assert ledger._estimate is not None
    assert ledger._estimate._live_bytes == 20 * FLOAT


# ---------------------------------------------------------------------- other threads


def test_what_others_run_is_not_counted() -> None:
    model, optimizer, batch = made()
    with MemoryLedger(model, optimizer, batch) as alone:
        for _ in range(5):
            step(model, optimizer, batch)
    other = made()
    with Elsewhere(lambda: step(*other)), MemoryLedger(model, optimizer, batch) as ledger:
        for _ in range(5):
            step(model, optimizer, batch)
    expected = alone.breakdown()  # but that the optimizer had no state at first
    breakdown = ledger.breakdown()
    assert breakdown.maxima == expected.maxima
    assert breakdown.start_bytes == expected.end_bytes
    assert breakdown.end_bytes == expected.end_bytes


def test_the_model_itself_may_be_used_elsewhere_in_mid_step() -> None:
    """As a server answers while the model learns."""
    model, optimizer, batch = made()
    step(model, optimizer, batch)
    with MemoryLedger(model, optimizer, batch) as alone:
        step(model, optimizer, batch)

    def answer() -> None:
        model(torch.ones(1000, 4)).sum()
        annotate("elsewhere")

    def answer_elsewhere(*args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            with Elsewhere(answer):
                pass

    model[1].register_forward_hook(answer_elsewhere)
    model[1].register_full_backward_hook(answer_elsewhere)
    with MemoryLedger(model, optimizer, batch) as ledger:
        step(model, optimizer, batch)
    expected, breakdown = alone.breakdown(), ledger.breakdown()
    assert breakdown.maxima == expected.maxima
    assert breakdown.timeline == expected.timeline
    assert breakdown.modules == expected.modules


def test_a_checkpoint_may_be_written_meanwhile() -> None:
    model, optimizer, batch = made()
    step(model, optimizer, batch)

    def save() -> None:
        torch.save((model.state_dict(), optimizer.state_dict()), io.BytesIO())

    with MemoryLedger(model, optimizer, batch) as alone:
        step(model, optimizer, batch)
    with Elsewhere(save), MemoryLedger(model, optimizer, batch) as ledger:
        step(model, optimizer, batch)
    assert ledger.breakdown() == alone.breakdown()


def test_a_ledger_is_read_elsewhere_while_it_counts() -> None:
    model, optimizer, batch = made()
    with MemoryLedger(model, optimizer, batch) as ledger, Elsewhere(lambda: reads(ledger)):
        for _ in range(50):
            step(model, optimizer, batch)
    assert ledger.breakdown().end_bytes == (58 + 58) * FLOAT + batch.nbytes
    assert ledger.survivors() == ()


def test_what_others_free_is_seen_at_once() -> None:
    kept: list[torch.Tensor] = []

    def free() -> None:
        if kept:
            kept.pop()

    with MemoryLedger(nn.Linear(4, 4)) as ledger:
        with Elsewhere(free):
            for _ in range(1000):
                kept.append(torch.zeros(100))
            while kept:
                assert ledger.current_bytes >= 20 * FLOAT
        assert ledger.current_bytes == 20 * FLOAT
    assert ledger.breakdown().ledger_peak_bytes >= 20 * FLOAT + 400


def test_ledgers_in_two_threads_each_count_their_own() -> None:
    model, optimizer, batch = made()
    step(model, optimizer, batch)
    with MemoryLedger(model, optimizer, batch) as alone:
        step(model, optimizer, batch)
    expected = alone.breakdown()
    results: list[Any] = []
    begin = threading.Barrier(3)

    def count() -> None:
        mine = made()
        step(*mine)
        begin.wait(60)
        for _ in range(20):
            with MemoryLedger(*mine) as ledger:
                annotate("mine")
                step(*mine)
            results.append(ledger.breakdown())

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    for breakdown in results:
        assert breakdown.maxima == expected.maxima
        assert breakdown.at_peak == expected.at_peak
        assert breakdown.modules == expected.modules
        assert [event.name for event in breakdown.timeline].count("mine") == 1
    assert torch.UntypedStorage.resize_.__name__ == "resize_"
    assert "_replacement" not in torch.UntypedStorage.resize_.__qualname__


def test_a_ledger_that_is_left_in_another_thread_says_so_and_goes_on() -> None:
    errors: list[BaseException] = []

    def leave() -> None:
        try:
            ledger.__exit__(None, None, None)
        except RuntimeError as error:
            errors.append(error)

    with MemoryLedger(nn.Linear(4, 4)) as ledger:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        kept = torch.zeros(100)
        assert ledger.current_bytes == 20 * FLOAT + 400
    assert [str(error) for error in errors] == [
        "`MemoryLedger` must be left in the thread that entered it, whose operators it counts, but was left "
        "in another one and still counts. Enter and leave it in the same thread."
    ]
    assert ledger.breakdown().maxima[Category.TEMPORARY] == kept.nbytes
