"""What an operator holds is measured, on a part where the whole is large, in the original process."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch

from lightning_memtrain.core import MIB
from lightning_memtrain.ledger.operators.workspace import OpCall, OpWorkspace, op_call
from lightning_memtrain.planning.prediction.cpu import calibration
from lightning_memtrain.planning.prediction.cpu.calibration import AskedWorkspace, measure_call
from lightning_memtrain.planning.prediction.cpu.smaller_calls import sizes_of, smaller_sizes, with_size
from lightning_memtrain.planning.prediction.forked import call_in_asking_copy

aten = torch.ops.aten


def convolution(rows: int) -> OpCall:
    weight, bias = torch.empty(32, 16, 3, 3), torch.empty(32)
    picture = torch.empty(rows, 16, 24, 24)
    return op_call(
        aten.convolution.default, (picture, weight, bias, [2, 2], [1, 1], [1, 1], False, [0, 0], 1), {}
    )


def test_a_size_is_replaced_wherever_it_stands() -> None:
    call = op_call(aten.expand.default, (torch.empty(6, 1), [6, 4]), {})
    assert with_size(call, 6, 3) == op_call(aten.expand.default, (torch.empty(3, 1), [3, 4]), {})
    transposed = op_call(aten.mm.default, (torch.empty(5, 8).t(), torch.empty(5, 7)), {})
    assert with_size(transposed, 5, 2) == op_call(
        aten.mm.default, (torch.empty(2, 8).t(), torch.empty(2, 7)), {}
    )
    gaps = op_call(aten.neg.default, (torch.empty(6, 8)[:, :4],), {})
    assert with_size(gaps, 6, 3) is None


def test_sizes_are_in_the_order_of_bytes_and_keep_their_factors_of_two() -> None:
    call = op_call(aten.mm.default, (torch.empty(640, 10), torch.empty(10, 50)), {})
    assert sizes_of(call) == [10, 640, 50]
    assert [*smaller_sizes(1024)] == [256, 128, 64]
    assert [*smaller_sizes(50_257)] == [12_564 >> shift for shift in range(14)]


def test_an_operator_that_does_not_check_its_sizes_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def run(self: OpWorkspace, call: OpCall) -> int:
        raise Seen(call)

    # A layer of an LSTM whose weights have four rows for each number of its state.
    sizes = [(64, 16, 256), (2048, 256), (2048, 512), (2048,), (2048,), (16, 512), (16, 512)]
    given = [torch.empty(size) for size in sizes]
    rest = (False, [], 2, 512, 1, True, False, False, True)
    call = op_call(aten.mkldnn_rnn_layer.default, (*given, *rest), {})
    monkeypatch.setattr(OpWorkspace, "peak_bytes", run)
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "MOST_MEASURED_BYTES", 2**16)
    with pytest.raises(Seen) as seen:
        measure_call(pickle.dumps((call, 2**21)))
    assert seen.value.args == (call,)
    assert with_size(call, 256, 64) is None  # nor is a part of it timed


@pytest.mark.parametrize(("rows", "most_bytes"), [(20, MIB), (40, 3 * MIB // 2)])
def test_a_part_tells_what_the_whole_holds(
    rows: int, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = convolution(rows)
    whole = OpWorkspace("cpu").peak_bytes(call)
    made_bytes = rows * 32 * 12 * 12 * 4
    assert whole >= made_bytes
    monkeypatch.setattr(calibration, "MOST_MEASURED_BYTES", most_bytes)
    monkeypatch.setattr(calibration, "_MOST_BYTES", most_bytes)
    monkeypatch.setattr(calibration, "_known", {})
    assert measure_call(pickle.dumps((call, made_bytes))) == (whole, None)


def test_what_no_part_tells_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_MEASURED_BYTES", 0)
    monkeypatch.setattr(calibration, "_MOST_BYTES", 0)
    monkeypatch.setattr(calibration, "_known", {})
    peak_bytes, unknown = measure_call(pickle.dumps((convolution(2), 0)))
    assert (peak_bytes, unknown) == (0, "it is too large to be run, and a part of it does not tell")
    sparse = op_call(aten.add.Tensor, (torch.eye(4).to_sparse(), torch.ones(4, 4)), {})
    monkeypatch.setattr(calibration, "MOST_MEASURED_BYTES", MIB)
    peak_bytes, unknown = measure_call(pickle.dumps((sparse, 0)))
    assert (peak_bytes, unknown) == (0, "TypeError: cannot make a tensor of layout torch.sparse_coo")


def test_what_works_by_entry_holds_its_results_alone() -> None:
    workspace = AskedWorkspace(lambda question: (0, None), num_threads=2)
    ones, halves = torch.ones(8), torch.ones(8, dtype=torch.float16)
    assert workspace.most_bytes(op_call(aten.tanh.default, (ones,), {}), 32) == 32
    assert workspace.most_bytes(op_call(aten.add.Tensor, (ones, halves), {}), 32) == 32 + 2 * 80 + 2 * 80
    assert workspace.most_bytes(op_call(aten.clone.default, (ones.to_sparse(),), {}), 7) == 7


def test_a_copy_asks_the_original_process() -> None:
    here = os.getpid()

    def asks(ask: Any) -> tuple[int, list[Any]]:
        return os.getpid(), [ask(number) for number in (1, 2, "x" * 100_000)]

    there, answers = call_in_asking_copy(asks, lambda question: (os.getpid(), question))
    assert there != here
    assert answers == [(here, 1), (here, 2), (here, "x" * 100_000)]


def test_an_error_of_an_asking_copy_comes_back() -> None:
    def asks(ask: Any) -> None:
        raise KeyError(ask("name"))

    with pytest.raises(KeyError, match="NAME"):
        call_in_asking_copy(asks, str.upper)
