"""Workspace of single operators: measured once, exact, and without touching the program's state."""

import pytest
import torch
from torch import nn

from lightning_memtrain.ledger import MemoryLedger, OpWorkspace, allocator_statistics
from lightning_memtrain.ledger.operators.workspace import op_call

aten = torch.ops.aten


def test_an_operator_without_workspace_holds_its_result():
    x = torch.rand(100)
    assert OpWorkspace("cpu").peak_bytes(op_call(aten.add.Tensor, (x, x), {})) == 400


def test_an_in_place_operator_holds_nothing():
    x = torch.rand(100)
    assert OpWorkspace("cpu").peak_bytes(op_call(aten.add_.Tensor, (x, x), {})) == 0


def test_equal_calls_are_measured_once():
    workspace = OpWorkspace("cpu")
    first = op_call(aten.mul.Tensor, (torch.rand(3, 4), 2.0), {})
    same = op_call(aten.mul.Tensor, (torch.zeros(3, 4, device="meta"), 2.0), {})
    other = op_call(aten.mul.Tensor, (torch.rand(4, 3).t(), 2.0), {})
    assert first == same
    assert first != other
    workspace.peak_bytes(first)
    assert list(workspace._peaks) == [first]


def test_random_state_is_kept():
    call = op_call(aten.bernoulli.p, (torch.rand(10), 0.5), {})
    state = torch.get_rng_state()
    assert OpWorkspace("cpu").peak_bytes(call) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_that_made_up_data_cannot_run_is_listed():
    workspace = OpWorkspace("cpu")
    call = op_call(aten.mm.default, (torch.rand(2, 3), torch.rand(2, 3)), {})
    assert workspace.peak_bytes(call) == 0
    assert "mat1 and mat2 shapes cannot be multiplied" in workspace.unmeasured[call]


def test_a_sparse_argument_is_listed_as_not_measured():
    workspace = OpWorkspace("cpu")
    call = op_call(aten.mm.default, (torch.eye(3).to_sparse(), torch.rand(3, 3)), {})
    assert workspace.peak_bytes(call) == 0
    assert "a tensor of layout torch.sparse_coo" in workspace.unmeasured[call]


def test_prediction_from_meta_equals_the_allocators_peak():
    def make(device):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)).to(device)
        return model, torch.ones(4, 3, 16, 16, device=device)

    model, batch = make("meta")
    with MemoryLedger(model, inputs=batch, workspace=OpWorkspace("cpu")) as ledger:
        model(batch).sum().backward()

    model, batch = make("cpu")
    allocator = allocator_statistics(torch.device("cpu"))
    with MemoryLedger(model, inputs=batch) as real:
        allocator.start()
        model(batch).sum().backward()
        reading = allocator.stop(real.breakdown().start_bytes)
    assert ledger.predicted_peak_bytes == pytest.approx(reading.peak_bytes, rel=1e-3)


def test_measuring_inside_a_ledger_is_not_counted():
    model = nn.Linear(4, 4)
    workspace = OpWorkspace("cpu")
    with MemoryLedger(model, workspace=workspace) as ledger:
        model(torch.ones(2, 4)).sum().backward()
        before = ledger.breakdown()
        assert ledger.predicted_peak_bytes > 0
        assert ledger.breakdown() == before


def test_a_device_without_allocator_is_refused():
    message = r"`OpWorkspace\(device\)` must be a device whose allocator reports its peak, but got meta"
    with pytest.raises(ValueError, match=message):
        OpWorkspace("meta")
