"""A block is broken off before the operator that would go beyond its limit."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memtrain.core import OutOfReach, does_not_fit
from lightning_memtrain.ledger import AllocationLimit, LimitReached, MemoryLedger, ResultBytes

CPU = torch.device("cpu")


def made(func: Any, *args: Any, **kwargs: Any) -> int:
    return ResultBytes(CPU).before(func, args, kwargs)


def test_results_are_known_before_an_operator_runs():
    aten, x, y = torch.ops.aten, torch.ones(8, 4), torch.ones(4, 16)
    assert made(aten.mm.default, x, y) == 8 * 16 * 4
    assert made(aten.relu.default, x) == 8 * 4 * 4
    assert made(aten.native_layer_norm.default, x, [4], None, None, 1e-5) == (8 * 4 + 8 + 8) * 4
    assert made(aten.max.dim, x, 1) == 8 * 4 + 8 * 8  # values and places
    assert made(aten.split.Tensor, x, 2) == made(aten.t.default, x) == made(aten.add_.Tensor, x, x) == 0
    assert made(aten.zeros.default, [3, 5], dtype=torch.float64, device=CPU) == 15 * 8
    assert made(aten.cat.default, [x, x]) == 2 * 8 * 4 * 4
    assert made(aten._foreach_sqrt.default, [x, y]) == (8 * 4 + 4 * 16) * 4
    assert made(aten.add.out, x, x, out=torch.empty(8, 4)) == 0


def test_what_depends_on_data_is_put_at_what_was_seen_before():
    results, nonzero = ResultBytes(CPU), torch.ops.aten.nonzero.default
    x = torch.ones(10, dtype=torch.float32)
    assert results.before(nonzero, (x,), {}) == 40  # as much as there goes in
    results.after(60)
    assert results.before(nonzero, (torch.ones(100),), {}) == 600
    results.after(200)
    assert results.before(nonzero, (torch.ones(100),), {}) == 600  # the most that was seen


def test_what_makes_more_than_its_form_says_is_learned():
    """One operator runs a whole LSTM on the CPU, and keeps for backward what no form shows."""
    lstm = nn.LSTM(8, 8)
    results = ResultBytes(CPU)
    needed: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = results.before(func, args, kwargs or {})
            outputs = func(*args, **(kwargs or {}))
            if "rnn_layer" in func.name():
                real = sum(
                    {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in outputs}.values()
                )
                results.after(real)
                needed.append((before, real))
            return outputs

    with Watch():
        lstm(torch.ones(4, 2, 8))
        lstm(torch.ones(4, 4, 8))
    if not needed:
        pytest.skip("this CPU runs an LSTM in small operators")
    (first, real), (second, twice) = needed
    assert first < real
    assert second >= twice


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
        self.weights = torch.ones(1000)  # neither parameter nor buffer
        self.catches = False

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        try:
            return self.layers(batch) * self.weights.sum()
        except RuntimeError:
            if not self.catches:
                raise
            return batch


def run(limit_bytes: int, catches: bool = False, known: bool = True) -> tuple[AllocationLimit, int]:
    """The limit, and the peak by a ledger that has none."""
    model, batch = Net(), torch.ones(32, 16)
    model.catches = catches
    limit, loss = AllocationLimit(limit_bytes, ResultBytes(CPU)), None
    with MemoryLedger(model, inputs=(batch, model.weights) if known else batch) as ledger:
        with suppress(LimitReached), ledger.limited(limit):
            loss = model(batch).sum()
            if loss.requires_grad:
                loss.backward()
        del loss
    return limit, ledger.breakdown().ledger_peak_bytes


PEAK = run(10**9)[1]
PARAMETERS = 4 * sum(parameter.numel() for parameter in Net().parameters())


def test_a_ledger_may_have_a_limit_from_the_beginning():
    ledger = MemoryLedger(Net(), limit=AllocationLimit(1, ResultBytes(CPU)))
    with pytest.raises(LimitReached, match="would be live, but 1 B may be"), ledger:
        torch.ones(2)


@pytest.mark.parametrize("known", [True, False])
def test_a_block_within_its_limit_runs_to_its_end(known: bool):
    limit, peak = run(PEAK, known=known)
    assert limit.needed_bytes is None
    assert peak == PEAK


@pytest.mark.parametrize("short_by", [1, 4, 1000, 4000, 6000, 9000])
def test_a_block_is_broken_off_before_it_is_above(short_by: int):
    limit, peak = run(PEAK - short_by)
    assert limit.needed_bytes is not None
    assert peak <= PEAK - short_by < limit.needed_bytes <= PEAK


def test_what_was_live_from_the_start_counts_even_if_it_is_seen_late():
    # After the first layer and the activation there were the weights, too, though nobody had seen them.
    after_tanh = PARAMETERS + 32 * 16 * 4 + 4000 + 2 * 32 * 64 * 4
    needed_bytes = run(after_tanh, known=False)[0].needed_bytes
    assert needed_bytes is not None
    assert needed_bytes > after_tanh  # in backward
    limit, peak = run(after_tanh - 1, known=False)
    assert limit.needed_bytes == after_tanh
    assert peak == after_tanh


def test_whoever_catches_the_error_does_not_hide_it():
    limit, peak = run(PEAK - 9000, catches=True)
    assert limit.needed_bytes is not None
    assert peak <= PEAK - 9000


def test_a_block_after_another_has_a_limit_of_its_own():
    model, batch = Net(), torch.ones(32, 16)
    with MemoryLedger(model, inputs=batch) as ledger:
        model(batch)
        ends = ledger.tick
        limit = AllocationLimit(ledger.current_bytes + 8, ResultBytes(CPU))
        with ledger.limited(limit):  # what came before neither counts as late nor as a peak
            torch.ones(2)
        torch.ones(1000)
    assert limit.needed_bytes is None
    assert ledger.held_between(ends, ledger.tick).total_bytes == limit.limit_bytes - 8 + 4000


def test_the_error_says_what_was_needed():
    error = LimitReached(2048, 1024)
    assert str(error) == "at least 2.00 KiB would be live, but 1.00 KiB may be"
    assert isinstance(error, OutOfReach)
    assert does_not_fit(error)
